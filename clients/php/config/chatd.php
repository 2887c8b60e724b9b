<?php

return [
    // Where chatd's HTTP API is, and its token: `api.internal_token` of chatd, or what `chatd` wrote at its first start.
    'url' => env('CHATD_URL', 'http://127.0.0.1:8080'),
    'token' => env('CHATD_INTERNAL_TOKEN', ''),

    // Seconds. A request that may be repeated is tried so often, with the same key.
    'connect_timeout' => 2.0,
    'timeout' => 10.0,
    'attempts' => 3,

    // `auth.secret` of chatd, if this application signs its users' tokens itself; then also what chatd expects in
    // `auth.audience` and `auth.issuer`. `ttl` is in seconds.
    'auth' => [
        'secret' => env('CHATD_AUTH_SECRET', ''),
        'audience' => null,
        'issuer' => null,
        'ttl' => 3600,
    ],

    // `webhooks.secret` of chatd.
    'webhook_secret' => env('CHATD_WEBHOOK_SECRET', ''),
];
