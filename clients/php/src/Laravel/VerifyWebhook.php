<?php

declare(strict_types=1);

namespace Chatd\Laravel;

use Chatd\Exceptions\InvalidSignature;
use Chatd\Webhook;
use Chatd\WebhookEvent;
use Closure;
use Illuminate\Http\Request;
use Symfony\Component\HttpKernel\Exception\AccessDeniedHttpException;

/** Middleware for the route of chatd's webhooks: 403 for what chatd has not sent. */
final class VerifyWebhook
{
    public function __construct(private readonly Webhook $webhook)
    {
    }

    public function handle(Request $request, Closure $next): mixed
    {
        try {
            $event = $this->webhook->verify((string) $request->getContent(), $request->headers->all());
        } catch (InvalidSignature $refusal) {
            throw new AccessDeniedHttpException($refusal->getMessage(), $refusal);
        }
        $request->attributes->set(WebhookEvent::class, $event);

        return $next($request);
    }
}
