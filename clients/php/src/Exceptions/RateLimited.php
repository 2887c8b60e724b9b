<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** Too many requests; `retryAfter` says when to come back. */
class RateLimited extends ChatdException
{
}
