<?php

declare(strict_types=1);

namespace Chatd;

/** An HTTP answer. */
final class Response
{
    public function __construct(public readonly int $status, public readonly string $body)
    {
    }

    /**
     * The JSON object in the body; null if there is none.
     *
     * @return array<string, mixed>|null
     */
    public function json(): ?array
    {
        $found = json_decode($this->body, true, 512, JSON_BIGINT_AS_STRING);

        return is_array($found) ? $found : null;
    }
}
