<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

use Chatd\Response;
use RuntimeException;
use Throwable;

/** A refusal by chatd, or no answer. Match on the class or on `error`; a sentence may change. */
class ChatdException extends RuntimeException
{
    /**
     * @param  string  $error  chatd's code: `bad_request`, `not_found`, `unavailable` … (docs/errors.md)
     * @param  int  $status  of HTTP; 0 if no answer came, or for one message of a batch
     * @param  array<string, list<string>>  $errors  for each field that is wrong, sentences that say what is wrong
     * @param  float|null  $retryAfter  seconds after which a retry may succeed
     * @param  string|null  $incident  the id of this error in chatd's log
     */
    final public function __construct(
        string $message,
        public readonly string $error = 'unavailable',
        public readonly int $status = 0,
        public readonly array $errors = [],
        public readonly ?float $retryAfter = null,
        public readonly ?string $incident = null,
        public readonly bool $sent = true, // false: chatd has certainly not seen the request
        ?Throwable $previous = null,
    ) {
        parent::__construct($message, $status, $previous);
    }

    /** The first field that is wrong; null if no field is. */
    public function field(): ?string
    {
        return array_key_first($this->errors);
    }

    /** What an answer that is no success says. */
    public static function of(Response $response): self
    {
        $found = $response->json();
        if (isset($found['code'], $found['message'])) {
            return self::from($found, $response->status);
        }
        $sentence = "An answer with status {$response->status} that is not chatd's; is CHATD_URL the address of its API?";
        if (in_array($response->status, [502, 503, 504], true)) {
            return new Unavailable($sentence, 'unavailable', $response->status);
        }

        return new self($sentence, 'unknown', $response->status);
    }

    /** @param  array<string, mixed>  $found  an Error of chatd's */
    public static function from(array $found, int $status = 0): self
    {
        $class = match ($found['code']) {
            'bad_request', 'too_large' => Invalid::class,
            'unauthorized', 'token_expired' => Unauthorized::class,
            'forbidden', 'muted' => Forbidden::class,
            'not_found' => NotFound::class,
            'conflict', 'limit_exceeded' => Conflict::class,
            'rate_limited' => RateLimited::class,
            'unavailable' => Unavailable::class,
            default => self::class,
        };
        $wait = isset($found['retry_after']) ? (float) $found['retry_after'] : null;

        return new $class(
            $found['message'], $found['code'], $status, $found['errors'] ?? [], $wait, $found['incident'] ?? null,
        );
    }
}
