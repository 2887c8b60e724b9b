<?php

declare(strict_types=1);

namespace Chatd;

use InvalidArgumentException;

/** Makes the tokens with which users connect: JWTs of HS256, by chatd's `auth.secret`. */
final class TokenSigner
{
    private const SHORTEST = 32; // bytes, as chatd wants it

    /** `$audience` and `$issuer` are what chatd has as `auth.audience` and `auth.issuer`, if it has any. */
    public function __construct(
        #[\SensitiveParameter] private readonly string $secret,
        private readonly ?string $audience = null,
        private readonly ?string $issuer = null,
        private readonly int $ttl = 3600,
    ) {
        if (strlen($secret) < self::SHORTEST) {
            throw new InvalidArgumentException('The secret is shorter than 32 characters; use chatd\'s auth.secret.');
        }
    }

    /**
     * @param  int|null  $ttl  seconds
     * @param  array<int>|null  $conversations  which the token opens without a membership
     */
    public function sign(int $userId, ?int $ttl = null, ?array $conversations = null): string
    {
        $now = time();
        $claims = ['sub' => (string) $userId, 'iat' => $now, 'exp' => $now + ($ttl ?? $this->ttl)];
        $claims += array_filter(
            [
                'aud' => $this->audience,
                'iss' => $this->issuer,
                // A list even with holes in its keys, as array_filter leaves them.
                'conversations' => $conversations === null ? null : array_values($conversations),
            ],
            fn (mixed $value) => $value !== null,
        );
        $signed = self::encode(['typ' => 'JWT', 'alg' => 'HS256']).'.'.self::encode($claims);

        return $signed.'.'.self::base64(hash_hmac('sha256', $signed, $this->secret, true));
    }

    /** @param  array<string, mixed>  $part */
    private static function encode(array $part): string
    {
        return self::base64(json_encode($part, JSON_THROW_ON_ERROR | JSON_UNESCAPED_SLASHES));
    }

    private static function base64(string $bytes): string
    {
        return rtrim(strtr(base64_encode($bytes), '+/', '-_'), '=');
    }
}
