<?php

declare(strict_types=1);

namespace Chatd\Tests;

use Chatd\Client;
use Chatd\Exceptions\InvalidSignature;
use Chatd\Laravel\Chatd;
use Chatd\Laravel\ChatdServiceProvider;
use Chatd\Laravel\HttpTransport;
use Chatd\Laravel\PingCommand;
use Chatd\Laravel\VerifyWebhook;
use Chatd\TokenSigner;
use Chatd\Transport;
use Chatd\Webhook;
use Chatd\WebhookEvent;
use Illuminate\Http\Client\Factory;
use Illuminate\Http\Request;
use Illuminate\Support\Facades\Facade;
use Illuminate\Support\Facades\Http;
use Illuminate\Support\ServiceProvider;
use Laravel\Lumen\Application;
use Symfony\Component\Console\Input\ArrayInput;
use Symfony\Component\Console\Output\BufferedOutput;
use Symfony\Component\HttpKernel\Exception\AccessDeniedHttpException;

/** In a real application, of the Lumen that is there. */
final class LaravelTest extends TestCase
{
    private const SECRET = '0123456789abcdef0123456789abcdef';

    protected function tearDown(): void
    {
        Facade::clearResolvedInstances();
    }

    /** @param  array<string, mixed>  $config */
    private static function application(array $config = []): Application
    {
        $app = new Application(sys_get_temp_dir());
        $app->withFacades();
        $app['config']->set('chatd', $config);
        $app->singleton(Factory::class); // as Laravel has it
        $app->register(ChatdServiceProvider::class);
        $app->boot();

        return $app;
    }

    public function testTheConfigurationMakesEachClass(): void
    {
        $app = self::application(['auth' => ['secret' => self::SECRET] + self::defaults()['auth'], 'webhook_secret' => self::SECRET]);
        self::assertInstanceOf(HttpTransport::class, $app[Transport::class]);
        self::assertInstanceOf(TokenSigner::class, $app[TokenSigner::class]);
        self::assertInstanceOf(Webhook::class, $app[Webhook::class]);
        $room = self::id();
        self::assertSame(1, Chatd::post($room, 5, 'a')->seq);
        self::assertSame(5, Chatd::conversation($room)['members'][0]['user_id']);
        self::assertSame($app[Client::class], Chatd::getFacadeRoot());
        $published = ServiceProvider::pathsToPublish(ChatdServiceProvider::class, 'chatd-config');
        self::assertFileExists(array_key_first($published));
        self::assertStringEndsWith('config/chatd.php', reset($published));
    }

    public function testATestOfTheApplicationMayFakeChatd(): void
    {
        self::application();
        Http::fake(['*/api/ws/messages' => Http::response(['id' => 9, 'status' => 'ok', 'seq' => 2, 'created_at' => 'x'])]);
        self::assertSame(9, Chatd::post(1, 5, 'Hello')->id);
        Http::assertSent(fn ($request) => json_decode($request->body())->content === 'Hello');
    }

    public function testPingSaysWhatToChange(): void
    {
        [$status, $text] = self::ping();
        self::assertSame(0, $status, $text);
        self::assertStringContainsString('chatd is ready', $text);
        $server = new Script(Script::answer(200, '<html>'));
        $nobody = new Script();
        $nobody->close();
        foreach ([
            'chatd refuses the token' => ['token' => 'wrong'],
            'The token is empty' => ['token' => null],
            'is not chatd' => ['url' => $server->url],
            'Start chatd, or set CHATD_URL' => ['url' => $nobody->url, 'connect_timeout' => 0.5],
        ] as $sentence => $config) {
            [$status, $text] = self::ping($config);
            self::assertSame(1, $status);
            self::assertStringContainsString($sentence, $text);
        }
        $server->close();
        $ill = '{"status":"degraded","checks":{"database":"ok","redis":"no answer"}}';
        $server = new Script(Script::answer(200, $ill), Script::answer(200, '{"user_id":1}'));
        self::assertStringContainsString('chatd is degraded (redis)', self::ping(['url' => $server->url])[1]);
        $server->close();
    }

    public function testAMiddlewareLetsOnlyChatdIn(): void
    {
        $app = self::application(['webhook_secret' => self::SECRET]);
        $body = '{"event":"user.online","at":"2026-01-01T00:00:00.000000Z","data":{"user_id":5}}';
        $time = (string) time();
        $request = Request::create('/chat/events', 'POST', content: $body);
        $request->headers->add(['webhook-id' => '7', 'webhook-timestamp' => $time]);
        $pass = fn (Request $request) => $request->attributes->get(WebhookEvent::class);
        $middleware = $app[VerifyWebhook::class];
        $refusal = self::thrown(AccessDeniedHttpException::class, fn () => $middleware->handle($request, $pass));
        self::assertInstanceOf(InvalidSignature::class, $refusal->getPrevious());
        $signature = base64_encode(hash_hmac('sha256', "7.$time.$body", self::SECRET, true));
        $request->headers->set('webhook-signature', "v1,$signature");
        self::assertSame(['user_id' => 5], $middleware->handle($request, $pass)->data);
    }

    /** @return array<string, mixed> */
    private static function defaults(): array
    {
        return require __DIR__.'/../config/chatd.php';
    }

    /**
     * @param  array<string, mixed>  $config
     * @return array{int, string}
     */
    private static function ping(array $config = []): array
    {
        Facade::clearResolvedInstances();
        $command = new PingCommand();
        $command->setLaravel(self::application($config + ['attempts' => 1]));
        $output = new BufferedOutput();

        return [$command->run(new ArrayInput([]), $output), $output->fetch()];
    }
}
