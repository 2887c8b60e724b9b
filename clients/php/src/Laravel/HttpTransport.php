<?php

declare(strict_types=1);

namespace Chatd\Laravel;

use Chatd\Exceptions\ConnectionFailed;
use Chatd\Response;
use Chatd\Transport;
use GuzzleHttp\Exception\TransferException;
use Illuminate\Http\Client\ConnectionException;
use Illuminate\Http\Client\Factory;

/** Laravel's own HTTP client, so that `Http::fake()` and Telescope see the requests. Guzzle keeps the connection. */
final class HttpTransport implements Transport
{
    /** Both in seconds: until the connection is there, and until the answer is. */
    public function __construct(
        private readonly Factory $http,
        private readonly float $connectTimeout = 2.0,
        private readonly float $timeout = 10.0,
    ) {
    }

    public function send(string $method, string $url, array $headers, string $body): Response
    {
        // A new pending request each time: its `withHeaders` changes it in place.
        $request = $this->http->withHeaders($headers)->withOptions([
            'connect_timeout' => $this->connectTimeout,
            'timeout' => $this->timeout,
            'allow_redirects' => false,
        ]);
        if ($body !== '') {
            $request = $request->withBody($body, 'application/json');
        }
        try {
            $response = $request->send($method, $url);
        } catch (ConnectionException|TransferException $failure) { // the latter: the connection broke on the way
            throw new ConnectionFailed("No answer came: {$failure->getMessage()}.", previous: $failure);
        }
        // Without ext-curl Guzzle takes a truncated answer for a whole one.
        if (strlen($response->body()) < (int) $response->header('Content-Length')) {
            throw new ConnectionFailed('The connection ended in the middle of the answer.');
        }

        return new Response($response->status(), $response->body());
    }
}
