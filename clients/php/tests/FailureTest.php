<?php

declare(strict_types=1);

namespace Chatd\Tests;

use Chatd\Client;
use Chatd\Exceptions\ChatdException;
use Chatd\Exceptions\ConnectionFailed;
use Chatd\Exceptions\RateLimited;
use Chatd\Exceptions\Unavailable;
use Chatd\StreamTransport;
use InvalidArgumentException;

/** What does not answer as it should: servers that break off, are silent, or are not chatd. */
final class FailureTest extends TestCase
{
    private const STORED = '{"id":1,"status":"ok","seq":1,"created_at":"2026-01-01T00:00:00.000000Z"}';

    private const BUSY = '{"message":"Later.","code":"unavailable"}';

    public function testAPostIsRepeatedWithTheSameKey(): void
    {
        foreach (self::transports() as [$transport]) {
            $truncated = substr(Script::answer(200, self::STORED), 0, -9);
            foreach ([Script::answer(503, self::BUSY), '', $truncated, null, Script::answer(502, '<html>')] as $failure) {
                $server = new Script($failure, Script::answer(200, self::STORED));
                $stored = (new Client($server->url, 't', $transport))->post(1, 5, 'Hello');
                [$first, $second] = [$server->next(), $server->next()];
                self::assertSame(1, $stored->id);
                self::assertSame($first, $second);
                self::assertSame('POST /api/ws/messages', substr($first[0], 0, 21));
                self::assertSame(32, strlen($first[1]['client_id']));
                self::assertTrue($server->close());
            }
        }
    }

    public function testABatchIsRepeatedWithTheSameKeys(): void
    {
        $server = new Script('', Script::answer(200, '{"results":[]}'));
        (new Client($server->url, 't'))->batch([['conversation_id' => 1, 'sender_id' => 5, 'content' => 'a']]);
        [$first, $second] = [$server->next(), $server->next()];
        self::assertSame($first, $second);
        self::assertSame(32, strlen($first[1]['messages'][0]['client_id']));
        self::assertTrue($server->close());
    }

    public function testWhatMayHaveHappenedIsNotRepeatedWhereThatWouldShow(): void
    {
        foreach (['event' => [1, 'x'], 'revoke' => [5]] as $method => $arguments) {
            $server = new Script('', Script::answer(200, '{"status":"ok"}'));
            $call = fn () => (new Client($server->url, 't'))->$method(...$arguments);
            self::assertTrue(self::thrown(ConnectionFailed::class, $call)->sent);
            $server->next();
            self::assertTrue($server->close());
        }
    }

    public function testItGivesUp(): void
    {
        $server = new Script(...array_fill(0, 4, Script::answer(503, self::BUSY)));
        $failure = self::thrown(Unavailable::class, fn () => (new Client($server->url, 't'))->post(1, 5, 'x'));
        self::assertSame(['unavailable', 503, 'Later.'], [$failure->error, $failure->status, $failure->getMessage()]);
        array_map(fn () => $server->next(), [1, 2, 3]);
        self::assertTrue($server->close());
    }

    public function testItWaitsAsLongAsChatdAsksForButNotForMinutes(): void
    {
        $limited = fn (float $wait) => Script::answer(429, '{"message":"m","code":"rate_limited","retry_after":'.$wait.'}');
        $server = new Script($limited(0.6), Script::answer(200, self::STORED));
        $began = microtime(true);
        (new Client($server->url, 't'))->post(1, 5, 'x');
        self::assertGreaterThanOrEqual(0.3, microtime(true) - $began);
        $server->close();
        $server = new Script($limited(60.0));
        $refusal = self::thrown(RateLimited::class, fn () => (new Client($server->url, 't'))->post(1, 5, 'x'));
        self::assertSame(60.0, $refusal->retryAfter);
        $server->close();
    }

    public function testNobodyListens(): void
    {
        foreach (self::transports() as [$transport]) {
            $server = new Script();
            $server->close();
            $client = new Client($server->url, 't', $transport, attempts: 1);
            $failure = self::thrown(ConnectionFailed::class, fn () => $client->post(1, 5, 'x'));
            self::assertSame(['unavailable', 0], [$failure->error, $failure->status]);
        }
    }

    public function testSilenceEndsInTime(): void
    {
        foreach (self::transports() as [$transport]) {
            $server = new Script(null);
            $began = microtime(true);
            self::thrown(ConnectionFailed::class, fn () => (new Client($server->url, 't', $transport, 1))->user(5));
            self::assertGreaterThan(0.4, microtime(true) - $began);
            self::assertLessThan(5, microtime(true) - $began);
            $server->close();
        }
    }

    public function testWhatIsNotChatdIsNotBelieved(): void
    {
        foreach (self::transports() as [$transport]) {
            $there = Script::answer(302, '', 'Location: /login');
            foreach ([$there => 302, Script::answer(200, '<html>') => 200, Script::answer(404, '{"message":"m"}') => 404] as $answer => $status) {
                $server = new Script($answer);
                $client = new Client($server->url, 't', $transport);
                $failure = self::thrown(ChatdException::class, fn () => $client->post(1, 5, 'x'));
                self::assertSame(['unknown', $status], [$failure->error, $failure->status]);
                self::assertStringContainsString('CHATD_URL', $failure->getMessage());
                $server->next();
                self::assertTrue($server->close());
            }
        }
    }

    public function testAHeaderIsOneLine(): void
    {
        $client = new Client(self::url(), "secret\r\nX: y", new StreamTransport());
        self::thrown(InvalidArgumentException::class, fn () => $client->user(5));
    }
}
