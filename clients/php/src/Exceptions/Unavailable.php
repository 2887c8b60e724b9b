<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** chatd cannot say now. What was sent may have been stored: repeat it with the same key. */
class Unavailable extends ChatdException
{
}
