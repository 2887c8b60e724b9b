<?php

declare(strict_types=1);

namespace Chatd\Tests;

use Chatd\Client;
use Chatd\Laravel\HttpTransport;
use Chatd\StreamTransport;
use Chatd\Transport;
use Illuminate\Http\Client\Factory;

/** Tests against the chatd of CHATD_URL and CHATD_INTERNAL_TOKEN. */
abstract class TestCase extends \PHPUnit\Framework\TestCase
{
    private static int $ids = 0;

    protected static function url(): string
    {
        return (string) getenv('CHATD_URL');
    }

    protected static function client(?Transport $transport = null): Client
    {
        return new Client(self::url(), (string) getenv('CHATD_INTERNAL_TOKEN'), $transport ?? new StreamTransport());
    }

    /** A conversation or a user that no other test uses. */
    protected static function id(): int
    {
        return ++self::$ids;
    }

    /** @return array<string, array{Transport}> */
    public static function transports(): array
    {
        return ['streams' => [new StreamTransport(2.0, 0.5)], 'Laravel' => [new HttpTransport(new Factory(), 2.0, 0.5)]];
    }

    /**
     * @template T of \Throwable
     *
     * @param  class-string<T>  $class
     * @return T
     */
    protected static function thrown(string $class, callable $call): \Throwable
    {
        try {
            $call();
        } catch (\Throwable $thrown) {
            self::assertInstanceOf($class, $thrown, $thrown->getMessage());

            return $thrown;
        }
        self::fail("Nothing was thrown; $class was expected.");
    }
}
