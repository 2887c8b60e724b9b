<?php

declare(strict_types=1);

// With Composer its autoloader, else a small one of PSR-4, and the Lumen that Debian has.
if (is_file(__DIR__.'/../vendor/autoload.php')) {
    require __DIR__.'/../vendor/autoload.php';
} else {
    require_once 'Laravel/Lumen/autoload.php';
    require_once 'GuzzleHttp/autoload.php';
    spl_autoload_register(function (string $class): void {
        $file = preg_replace(
            ['#^Chatd/Tests/#', '#^Chatd/#'],
            [__DIR__.'/', __DIR__.'/../src/'],
            strtr($class, '\\', '/'),
        ).'.php';
        if (str_starts_with($class, 'Chatd\\') && is_file($file)) {
            require $file;
        }
    });
}
