<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** The token of the API is wrong. */
class Unauthorized extends ChatdException
{
}
