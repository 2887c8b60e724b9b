<?php

declare(strict_types=1);

namespace Chatd;

use Chatd\Exceptions\ConnectionFailed;

/** Sends one request. It keeps nothing of it: no header of one request reaches another. */
interface Transport
{
    /**
     * Follows no redirect, and returns an answer of any status.
     *
     * @param  array<string, string>  $headers
     *
     * @throws ConnectionFailed if no complete answer came in time
     */
    public function send(string $method, string $url, array $headers, string $body): Response;
}
