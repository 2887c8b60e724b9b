<?php

declare(strict_types=1);

namespace Chatd;

/** With which a user connects. */
final class Token
{
    public function __construct(
        #[\SensitiveParameter] public readonly string $token,
        public readonly int $expiresIn, // seconds
    ) {
    }

    public function __toString(): string
    {
        return $this->token;
    }
}
