<?php

declare(strict_types=1);

namespace Chatd;

use Chatd\Exceptions\ConnectionFailed;
use InvalidArgumentException;

/**
 * HTTP over PHP's own streams, without any extension: a connection for each request.
 *
 * Not the `http://` wrapper, which has one timeout for all and takes a truncated answer for a whole one. HTTP/1.0,
 * because an answer to it never comes in chunks.
 */
final class StreamTransport implements Transport
{
    private const READ = 65536;

    /** Both in seconds: until the connection is there, and from then until the answer is. */
    public function __construct(
        private readonly float $connectTimeout = 2.0,
        private readonly float $timeout = 10.0,
    ) {
    }

    public function send(string $method, string $url, array $headers, string $body): Response
    {
        $parts = parse_url($url);
        if (! is_array($parts) || ! isset($parts['host']) || ! in_array($parts['scheme'] ?? '', ['http', 'https'], true)) {
            throw new InvalidArgumentException("'$url' is no HTTP URL.");
        }
        $stream = $this->connect($parts);
        try {
            $until = microtime(true) + $this->timeout;
            // chatd may answer before it has read all, and close: then the answer says more than the failed write.
            $this->write($stream, self::request($method, $parts, $headers, $body), $until);

            return self::response($this->read($stream, $until));
        } finally {
            fclose($stream);
        }
    }

    /**
     * @param  array<string, mixed>  $parts
     * @return resource
     */
    private function connect(array $parts)
    {
        $tls = $parts['scheme'] === 'https';
        $address = ($tls ? 'tls' : 'tcp')."://{$parts['host']}:".($parts['port'] ?? ($tls ? 443 : 80));
        $stream = @stream_socket_client($address, $number, $error, $this->connectTimeout);
        if ($stream === false) {
            $reason = $error !== '' ? $error : (error_get_last()['message'] ?? 'no reason given');
            throw new ConnectionFailed("No connection to $address: $reason.", sent: false);
        }

        return $stream;
    }

    /**
     * @param  array<string, mixed>  $parts
     * @param  array<string, string>  $headers
     */
    private static function request(string $method, array $parts, array $headers, string $body): string
    {
        $target = ($parts['path'] ?? '/').(isset($parts['query']) ? "?{$parts['query']}" : '');
        $headers = [
            'Host' => $parts['host'].(isset($parts['port']) ? ":{$parts['port']}" : ''),
            'Connection' => 'close',
            'Content-Length' => (string) strlen($body),
        ] + $headers;
        $lines = ["$method $target HTTP/1.0"];
        foreach ($headers as $name => $value) {
            $line = "$name: $value";
            if (preg_match('/[\r\n\0]/', $line)) {
                throw new InvalidArgumentException("The header $name must be one line.");
            }
            $lines[] = $line;
        }

        return implode("\r\n", $lines)."\r\n\r\n$body";
    }

    /** @param  resource  $stream */
    private function write($stream, string $bytes, float $until): void
    {
        while ($bytes !== '') {
            $this->limit($stream, $until);
            $written = @fwrite($stream, $bytes);
            if ($written === false || $written === 0) {
                return;
            }
            $bytes = substr($bytes, $written);
        }
    }

    /** @param  resource  $stream */
    private function read($stream, float $until): string
    {
        $bytes = '';
        while (! feof($stream)) {
            $this->limit($stream, $until);
            $read = @fread($stream, self::READ);
            if ($read === false || stream_get_meta_data($stream)['timed_out']) {
                break;
            }
            $bytes .= $read;
        }

        return $bytes;
    }

    /** @param  resource  $stream */
    private function limit($stream, float $until): void
    {
        $left = $until - microtime(true);
        if ($left <= 0) {
            throw new ConnectionFailed("No answer came within {$this->timeout} s.");
        }
        stream_set_timeout($stream, (int) $left, (int) (($left - (int) $left) * 1e6) + 1);
    }

    private static function response(string $bytes): Response
    {
        [$head, $body] = explode("\r\n\r\n", $bytes, 2) + [1 => ''];
        if (! preg_match('#^HTTP/1\.\d (\d{3})#', $head, $status)) {
            throw new ConnectionFailed('The connection ended, or the time was over, before an answer came.');
        }
        if (preg_match('/^content-length:\s*(\d+)/mi', $head, $length) && strlen($body) < (int) $length[1]) {
            throw new ConnectionFailed('The connection ended, or the time was over, in the middle of the answer.');
        }

        return new Response((int) $status[1], $body);
    }
}
