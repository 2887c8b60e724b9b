<?php

declare(strict_types=1);

namespace Chatd\Laravel;

use Chatd\Client;
use Illuminate\Support\Facades\Facade;

/**
 * The client of `config/chatd.php`: `Chatd::post(…)`.
 *
 * @mixin Client
 */
final class Chatd extends Facade
{
    protected static function getFacadeAccessor(): string
    {
        return Client::class;
    }
}
