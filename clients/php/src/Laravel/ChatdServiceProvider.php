<?php

declare(strict_types=1);

namespace Chatd\Laravel;

use Chatd\Client;
use Chatd\StreamTransport;
use Chatd\TokenSigner;
use Chatd\Transport;
use Chatd\Webhook;
use GuzzleHttp\Client as Guzzle;
use Illuminate\Contracts\Container\Container;
use Illuminate\Http\Client\Factory;
use Illuminate\Support\ServiceProvider;

/** Makes the classes of this package from `config/chatd.php`, in Laravel and in Lumen. */
final class ChatdServiceProvider extends ServiceProvider
{
    private const CONFIG = __DIR__.'/../../config/chatd.php';

    public function register(): void
    {
        $this->mergeConfigFrom(self::CONFIG, 'chatd');
        $this->app->singleton(Transport::class, fn (Container $app) => self::transport($app, $app['config']['chatd']));
        $this->app->singleton(Client::class, function (Container $app) {
            $config = $app['config']['chatd'];

            return new Client($config['url'], (string) $config['token'], $app[Transport::class], $config['attempts']);
        });
        $this->app->singleton(TokenSigner::class, function (Container $app) {
            $auth = $app['config']['chatd']['auth'];

            return new TokenSigner((string) $auth['secret'], $auth['audience'], $auth['issuer'], $auth['ttl']);
        });
        $this->app->singleton(
            Webhook::class,
            fn (Container $app) => new Webhook((string) $app['config']['chatd']['webhook_secret']),
        );
    }

    public function boot(): void
    {
        if ($this->app->runningInConsole()) {
            $this->publishes([self::CONFIG => $this->app->basePath('config/chatd.php')], 'chatd-config');
            $this->commands([PingCommand::class]);
        }
    }

    /** @param  array<string, mixed>  $config */
    private static function transport(Container $app, array $config): Transport
    {
        [$connect, $all] = [$config['connect_timeout'], $config['timeout']];

        return class_exists(Factory::class) && class_exists(Guzzle::class)
            ? new HttpTransport($app[Factory::class], $connect, $all)
            : new StreamTransport($connect, $all);
    }
}
