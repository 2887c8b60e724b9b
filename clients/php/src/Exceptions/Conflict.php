<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** The key was used before with other content, or a limit is reached. */
class Conflict extends ChatdException
{
}
