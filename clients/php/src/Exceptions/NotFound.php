<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** It does not exist, or no longer. */
class NotFound extends ChatdException
{
}
