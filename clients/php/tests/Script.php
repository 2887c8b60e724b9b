<?php

declare(strict_types=1);

namespace Chatd\Tests;

/** A server that answers what it is told, in a process of its own. */
final class Script
{
    public readonly string $url;

    /** @var resource */
    private $process;

    /** @var array<int, resource> */
    private array $pipes = [];

    public function __construct(?string ...$answers)
    {
        $command = [PHP_BINARY, __DIR__.'/server.php', json_encode($answers)];
        $this->process = proc_open($command, [1 => ['pipe', 'w']], $this->pipes);
        $this->url = 'http://127.0.0.1:'.trim(fgets($this->pipes[1]));
    }

    /** An answer of HTTP. */
    public static function answer(int $status, string $body, string $header = 'X: y'): string
    {
        return "HTTP/1.1 $status X\r\n$header\r\nContent-Length: ".strlen($body)."\r\n\r\n$body";
    }

    /** @return array{string, mixed} the next request: its first line, and its JSON */
    public function next(): array
    {
        [$line, $body] = json_decode(fgets($this->pipes[1]), true);

        return [$line, json_decode($body, true)];
    }

    /** End it; returns whether it was asked no more. */
    public function close(): bool
    {
        proc_terminate($this->process);
        $rest = stream_get_contents($this->pipes[1]);
        proc_close($this->process);

        return $rest === '';
    }
}
