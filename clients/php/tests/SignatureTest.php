<?php

declare(strict_types=1);

namespace Chatd\Tests;

use Chatd\Exceptions\InvalidSignature;
use Chatd\TokenSigner;
use Chatd\Webhook;
use InvalidArgumentException;

/** Tokens and webhooks. Whether chatd itself takes and makes them is tested from outside. */
final class SignatureTest extends TestCase
{
    private const SECRET = '0123456789abcdef0123456789abcdef';

    private const BODY = '{"event":"user.online","at":"2026-01-01T00:00:00.000000Z","data":{"user_id":5,"meta":[]}}';

    public function testATokenSaysWhoseItIs(): void
    {
        [$head, $claims, $signature] = explode('.', (new TokenSigner(self::SECRET, 'chat', 'shop', 60))->sign(5, conversations: [3 => 1]));
        $read = fn (string $part) => json_decode(base64_decode(strtr($part, '-_', '+/')), true);
        self::assertSame('HS256', $read($head)['alg']);
        $found = $read($claims);
        self::assertEqualsWithDelta(time(), $found['iat'], 5);
        self::assertSame($found['iat'] + 60, $found['exp']);
        unset($found['iat'], $found['exp']);
        self::assertSame(['sub' => '5', 'aud' => 'chat', 'iss' => 'shop', 'conversations' => [1]], $found);
        $wanted = hash_hmac('sha256', "$head.$claims", self::SECRET, true);
        self::assertSame(rtrim(strtr(base64_encode($wanted), '+/', '-_'), '='), $signature);
        self::thrown(InvalidArgumentException::class, fn () => new TokenSigner('short'));
    }

    public function testAWebhookOfChatdsIsRead(): void
    {
        $event = (new Webhook(self::SECRET))->verify(self::BODY, self::headers(time()));
        self::assertSame(['7-ab', 'user.online', ['user_id' => 5, 'meta' => []]], [$event->id, $event->name, $event->data]);
        $lists = array_map(fn (string $value) => [$value], array_change_key_case(self::headers(time())));
        self::assertSame($event->id, (new Webhook(self::SECRET))->verify(self::BODY, $lists)->id);
    }

    public function testAnyOtherWebhookIsRefused(): void
    {
        $right = self::headers(time());
        $wrong = [
            'nothing' => [self::BODY, []],
            'another body' => [self::BODY.' ', $right],
            'another time' => [self::BODY, ['Webhook-Timestamp' => (string) (time() - 1)] + $right],
            'another id' => [self::BODY, ['Webhook-Id' => '8'] + $right],
            'too old' => [self::BODY, self::headers(time() - 301)],
            'too new' => [self::BODY, self::headers(time() + 301)],
            'null' => [self::BODY, ['Webhook-Signature' => [null]] + $right],
            'garbage' => [self::BODY, ['Webhook-Signature' => 'v1,é v1, ='] + $right],
        ];
        foreach ($wrong as [$body, $headers]) {
            self::thrown(InvalidSignature::class, fn () => (new Webhook(self::SECRET))->verify($body, $headers));
        }
        self::thrown(InvalidSignature::class, fn () => (new Webhook(strrev(self::SECRET)))->verify(self::BODY, $right));
        foreach (['', 'whsec_', 'whsec_!'] as $secret) {
            self::thrown(InvalidArgumentException::class, fn () => new Webhook($secret));
        }
    }

    /** @return array<string, string> */
    private static function headers(int $time): array
    {
        $signature = base64_encode(hash_hmac('sha256', "7-ab.$time.".self::BODY, self::SECRET, true));

        return ['Webhook-Id' => '7-ab', 'Webhook-Timestamp' => (string) $time, 'Webhook-Signature' => "v1a,x v1,$signature"];
    }
}
