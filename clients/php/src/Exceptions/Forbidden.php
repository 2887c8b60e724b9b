<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** chatd knows who asks, and does not allow it. */
class Forbidden extends ChatdException
{
}
