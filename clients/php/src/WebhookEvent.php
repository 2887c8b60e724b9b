<?php

declare(strict_types=1);

namespace Chatd;

/** What chatd reports, or asks (`before_message`). */
final class WebhookEvent
{
    /**
     * @param  string  $id  the same at each attempt: ignore an event whose id you have seen
     * @param  string  $name  `message.created`, `user.online` …
     * @param  string  $at  RFC 3339, in UTC
     * @param  array<string, mixed>  $data
     */
    public function __construct(
        public readonly string $id,
        public readonly string $name,
        public readonly string $at,
        public readonly array $data,
    ) {
    }
}
