<?php

declare(strict_types=1);

namespace Chatd\Laravel;

use Chatd\Client;
use Chatd\Ping;
use Illuminate\Console\Command;
use Illuminate\Contracts\Container\Container;
use InvalidArgumentException;

final class PingCommand extends Command
{
    protected $signature = 'chatd:ping';

    protected $description = 'Check the address and the token of chatd, and say what to change';

    public function handle(Container $app): int
    {
        try {
            $lines = Ping::run($app[Client::class], $app['config']['chatd']['url']);
        } catch (InvalidArgumentException $wrong) { // of the configuration
            $lines = [['ok' => false, 'text' => $wrong->getMessage()]];
        }
        foreach ($lines as ['ok' => $ok, 'text' => $text]) {
            $ok ? $this->info($text) : $this->error($text);
        }

        return end($lines)['ok'] ? 0 : 1;
    }
}
