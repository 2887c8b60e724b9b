<?php

declare(strict_types=1);

namespace Chatd;

use Chatd\Exceptions\InvalidSignature;
use InvalidArgumentException;

/** Checks that chatd has sent a webhook (Standard Webhooks: docs/webhooks.md). */
final class Webhook
{
    private readonly string $key;

    /**
     * @param  string  $secret  chatd's `webhooks.secret`
     * @param  int  $tolerance  seconds: an older event, or one from the future, is refused
     */
    public function __construct(#[\SensitiveParameter] string $secret, private readonly int $tolerance = 300)
    {
        $key = str_starts_with($secret, 'whsec_') ? base64_decode(substr($secret, 6), true) : $secret;
        if ($key === false || $key === '') {
            throw new InvalidArgumentException("The secret is empty, or no base64 after whsec_; use chatd's webhooks.secret.");
        }
        $this->key = $key;
    }

    /**
     * @param  string  $body  as it came, before anything reads it as JSON
     * @param  array<string, string|list<string|null>>  $headers  `getallheaders()`, or `$request->headers->all()`
     *
     * @throws InvalidSignature
     */
    public function verify(string $body, array $headers): WebhookEvent
    {
        [$id, $time, $given] = array_map(
            fn (string $name) => self::header($headers, $name),
            ['webhook-id', 'webhook-timestamp', 'webhook-signature'],
        );
        $wanted = 'v1,'.base64_encode(hash_hmac('sha256', "$id.$time.$body", $this->key, true));
        $fits = array_filter(explode(' ', $given), fn (string $one) => hash_equals($wanted, $one));
        if ($id === '' || ! $fits) {
            throw new InvalidSignature('The signature is missing, or not of this secret and body.');
        }
        if (abs(time() - (int) $time) > $this->tolerance) {
            throw new InvalidSignature("The event is more than {$this->tolerance} s old, or the clocks differ by that.");
        }
        $found = json_decode($body, true, 512, JSON_THROW_ON_ERROR | JSON_BIGINT_AS_STRING);

        return new WebhookEvent($id, $found['event'] ?? '', $found['at'] ?? '', $found['data'] ?? []);
    }

    /** @param  array<string, string|list<string|null>>  $headers */
    private static function header(array $headers, string $wanted): string
    {
        foreach ($headers as $name => $value) {
            if (strcasecmp((string) $name, $wanted) === 0) {
                return (string) (is_array($value) ? reset($value) : $value);
            }
        }

        return '';
    }
}
