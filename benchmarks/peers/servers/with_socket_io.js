// socket.io: an event `pub` goes to the room as `m`.
const { createServer } = require("http");
const { Server } = require("socket.io");

const http = createServer();
const io = new Server(http, {
  transports: ["websocket"],
  pingInterval: 3600000,
  pingTimeout: 3600000,
  perMessageDeflate: false,
  serveClient: false,
});

io.on("connection", (socket) => {
  if (socket.handshake.query.pub) {
    socket.on("pub", (text) => io.to("room").emit("m", text));
    return;
  }
  socket.join("room");
  socket.emit("hi");
});

http.listen({ host: "127.0.0.1", port: Number(process.argv[2]), backlog: 4096 });
