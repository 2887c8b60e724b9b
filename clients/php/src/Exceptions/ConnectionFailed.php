<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** No answer came. */
class ConnectionFailed extends Unavailable
{
}
