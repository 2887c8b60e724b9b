// ws: what comes in at /pub goes to everybody at /sub.
const { WebSocketServer } = require("ws");

const server = new WebSocketServer({
  host: "127.0.0.1",
  port: Number(process.argv[2]),
  perMessageDeflate: false,
  backlog: 4096,
});
const room = new Set();

server.on("connection", (socket, request) => {
  if (request.url === "/pub") {
    socket.on("message", (data) => {
      const text = data.toString();
      for (const subscriber of room) subscriber.send(text);
    });
    return;
  }
  room.add(socket);
  socket.on("close", () => room.delete(socket));
  socket.send("hi");
});
