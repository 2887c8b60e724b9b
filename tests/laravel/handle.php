<?php

/*
 * Handles one request with the application in the directory that argument 1 names: controllers in app/, routes in
 * routes/*.php, .env. Standard input has [method, path, body, headers, user id]; printed is [status, body].
 *
 * It is Debian's Lumen with Laravel's own components for validation, Eloquent, Redis and HTTP. What Lumen lacks and
 * Laravel has is made here: `Route`, `$request->validate()`, its answer of 422, and the user who is logged in.
 */

use Chatd\Laravel\ChatdServiceProvider;
use Illuminate\Auth\GenericUser;
use Illuminate\Contracts\Debug\ExceptionHandler;
use Illuminate\Http\Request;
use Illuminate\Redis\RedisServiceProvider;
use Illuminate\Support\Facades\Facade;
use Illuminate\Support\Facades\Schema;
use Illuminate\Support\Str;
use Illuminate\Validation\ValidationException;
use Illuminate\Validation\ValidationServiceProvider;
use Laravel\Lumen\Application;
use Laravel\Lumen\Bootstrap\LoadEnvironmentVariables;
use Laravel\Lumen\Exceptions\Handler;

foreach (['Laravel/Lumen', 'GuzzleHttp', 'Illuminate/Redis', 'Predis'] as $library) {
    require_once "$library/autoload.php";
}
$directory = $argv[1];
$folders = ['App\\' => "$directory/app/", 'Chatd\\' => dirname(__DIR__, 2).'/clients/php/src/'];
spl_autoload_register(function (string $class) use ($folders): void {
    foreach ($folders as $prefix => $folder) {
        $file = $folder.strtr(substr($class, strlen($prefix)), '\\', '/').'.php';
        if (str_starts_with($class, $prefix) && is_file($file)) {
            require $file;
        }
    }
});

(new LoadEnvironmentVariables($directory))->bootstrap();
$app = new Application($directory);
$app->withFacades(false);
$app->singleton(ExceptionHandler::class, fn () => new class extends Handler {
    public function render($request, Throwable $thrown)
    {
        $invalid = $thrown instanceof ValidationException;

        return $invalid
            ? response()->json(['message' => $thrown->getMessage(), 'errors' => $thrown->errors()], $thrown->status)
            : parent::render($request, $thrown);
    }
});
// config/database.php as the skeleton of Laravel has it; until the summer of 2025 with underscores.
$sign = env('SKELETON') === 'old' ? '_' : '-';
$app['config']->set('database', [
    'default' => 'sqlite',
    'connections' => ['sqlite' => ['driver' => 'sqlite', 'database' => "$directory/database.sqlite"]],
    'redis' => [
        'client' => env('REDIS_CLIENT', 'phpredis'),
        'options' => ['prefix' => env('REDIS_PREFIX', Str::slug(env('APP_NAME', 'laravel'), $sign)."{$sign}database{$sign}")],
        'default' => ['host' => env('REDIS_HOST', '127.0.0.1'), 'port' => env('REDIS_PORT', '6379'), 'database' => 0],
    ],
]);
$app->withEloquent();
$app->register(RedisServiceProvider::class);
$app->register(ValidationServiceProvider::class);
$app->register(ChatdServiceProvider::class);
class_alias(Chatd\Laravel\Chatd::class, 'Chatd');
Request::macro('validate', fn (array $rules) => validator($this->all(), $rules)->validate());

final class Route
{
    public static function __callStatic(string $method, array $arguments): self
    {
        [$path, $action] = $arguments;
        $action = $action instanceof Closure ? $action : ['uses' => implode('@', $action)];
        Facade::getFacadeApplication()->router->$method($path, $action);

        return new self();
    }

    /** The tests log their users in themselves. */
    public function middleware(string $name): self
    {
        return $this;
    }
}

if (! is_file("$directory/database.sqlite")) {
    touch("$directory/database.sqlite");
    Schema::create('chat_messages', function ($table) {
        $table->id();
        $table->unsignedBigInteger('chat_conversation_id');
        $table->unsignedBigInteger('user_id');
        $table->string('type');
        $table->text('content');
        $table->json('meta')->nullable();
        $table->timestamps();
    });
}
foreach (glob("$directory/routes/*.php") as $file) {
    $prefix = basename($file) === 'api.php' ? 'api' : '';
    $app->router->group(['prefix' => $prefix], fn () => require $file);
}

[$method, $path, $body, $headers, $user] = json_decode(stream_get_contents(STDIN), true);
$request = Request::create($path, $method, content: $body);
$request->headers->add(['Content-Type' => 'application/json', 'Accept' => 'application/json'] + $headers);
$app['auth']->viaRequest('test', fn () => $user ? new GenericUser(['id' => $user]) : null);
$app['config']->set('auth', ['defaults' => ['guard' => 'test'], 'guards' => ['test' => ['driver' => 'test']]]);
$response = $app->handle($request);
echo json_encode([$response->getStatusCode(), $response->getContent()]), "\n";
