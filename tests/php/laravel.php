<?php
// What the documentation's PHP needs of Laravel, so that plain PHP can run it. `Http` behaves as Illuminate's, and so do
// its traps: `withHeaders` changes the client that it is called on, and an empty array is sent as `[]`.

class PendingRequest
{
    private array $options = [];
    private string $base = '';
    private bool $throws = false;

    public function baseUrl(string $url): static { $this->base = rtrim($url, '/'); return $this; }

    public function withHeaders(array $headers): static
    {
        $this->options = array_merge_recursive($this->options, ['headers' => $headers]);
        return $this;
    }

    public function acceptJson(): static { return $this->withHeaders(['Accept' => 'application/json']); }
    public function throw(): static { $this->throws = true; return $this; }

    public function get(string $url): Response { return $this->send('GET', $url); }
    public function post(string $url, array $data = []): Response { return $this->send('POST', $url, json_encode($data)); }
    public function put(string $url, array $data = []): Response { return $this->send('PUT', $url, json_encode($data)); }
    public function patch(string $url, array $data = []): Response { return $this->send('PATCH', $url, json_encode($data)); }
    public function delete(string $url, array $data = []): Response
    {
        return $this->send('DELETE', $url, $data ? json_encode($data) : null);
    }

    private function send(string $method, string $url, ?string $body = null): Response
    {
        $lines = $body === null ? [] : ['Content-Type: application/json'];
        foreach ($this->options['headers'] ?? [] as $name => $values) {
            foreach ((array) $values as $value) {
                $lines[] = "$name: $value";
            }
        }
        $http = ['method' => $method, 'header' => $lines, 'ignore_errors' => true, 'timeout' => 20];
        $http += $body === null ? [] : ['content' => $body];
        $text = file_get_contents($this->base.$url, false, stream_context_create(['http' => $http]));
        $status = (int) explode(' ', $http_response_header[0])[1];
        if ($this->throws && $status >= 400) {
            throw new RuntimeException("$method $url: $status $text");
        }
        return new Response($text, $status);
    }
}

class Http
{
    private static array $macros = [];

    public static function macro(string $name, callable $macro): void { self::$macros[$name] = $macro; }

    public static function __callStatic(string $name, array $arguments)
    {
        return isset(self::$macros[$name]) ? (self::$macros[$name])(...$arguments) : (new PendingRequest)->$name(...$arguments);
    }
}

class Response
{
    public function __construct(private string $body, private int $status = 200) {}
    public function status(): int { return $this->status; }
    public function body(): string { return $this->body; }
    public function json(?string $key = null) { $all = json_decode($this->body, true); return $key === null ? $all : $all[$key]; }
}

class Redis
{
    public static function connection(string $name): static { return new static; }

    public function executeRaw(array $words): string
    {
        $server = stream_socket_client(getenv('REDIS_ADDRESS'), $number, $text, 5);
        $line = '*'.count($words)."\r\n";
        foreach ($words as $word) {
            $line .= '$'.strlen($word)."\r\n$word\r\n";
        }
        fwrite($server, $line);
        return fgets($server);
    }
}

class Route
{
    public static array $routes = [];

    public static function __callStatic(string $method, array $arguments): static
    {
        self::$routes[strtoupper($method).' '.$arguments[0]] = $arguments[1];
        return new static;
    }

    public function middleware(string ...$names): static { return $this; }
    public function withoutMiddleware(string ...$names): static { return $this; }
}

class Request
{
    public function __construct(private array $headers = [], private array $input = [], private ?object $user = null) {}
    public function user(): ?object { return $this->user; }
    public function input(string $key, $default = null) { return $this->input[$key] ?? $default; }
    public function header(string $name, $default = null) { return $this->headers[strtolower($name)] ?? $default; }
}

class Refused extends Exception {}

function abort(int $status): never { throw new Refused('', $status); }
function abort_unless($condition, int $status): void { $condition || abort($status); }
function response(string $body): Response { return new Response($body); }
function env(string $name, $default = null) { $found = getenv($name); return $found === false ? $default : $found; }

function config(string $key)
{
    return [
        'services.chatd.url' => getenv('CHATD_URL'),
        'services.chatd.token' => getenv('CHATD_INTERNAL_TOKEN'),
    ][$key];
}
