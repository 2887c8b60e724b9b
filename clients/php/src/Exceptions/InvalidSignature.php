<?php

declare(strict_types=1);

namespace Chatd\Exceptions;

use RuntimeException;

/** A webhook that chatd has not sent, or one that is older than the tolerance. */
final class InvalidSignature extends RuntimeException
{
}
