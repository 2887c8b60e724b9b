<?php

declare(strict_types=1);

namespace Chatd;

/** A message that chatd has stored. A retry gets the `id` and the `seq` of the first attempt. */
final class Stored
{
    /**
     * @param  int  $seq  the number of the change in its conversation: 1, 2, 3 …
     * @param  string  $createdAt  RFC 3339, in UTC
     * @param  bool  $duplicate  whether this was a retry
     */
    public function __construct(
        public readonly int $id,
        public readonly int $seq,
        public readonly string $createdAt,
        public readonly bool $duplicate = false,
    ) {
    }

    /** @param  array<string, mixed>  $found  a Stored of chatd's */
    public static function from(array $found): self
    {
        return new self($found['id'], $found['seq'], $found['created_at'], $found['duplicate'] ?? false);
    }
}
