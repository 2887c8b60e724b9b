<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

/** Something in the request is wrong or too large; `errors` and `field()` say what. */
class Invalid extends ChatdException
{
}
