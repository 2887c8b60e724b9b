<?php

declare(strict_types=1);

namespace Chatd;

use Chatd\Exceptions\ChatdException;
use Chatd\Exceptions\ConnectionFailed;
use Chatd\Exceptions\Unauthorized;

/** Whether chatd can be used from here, and what to change if it cannot. */
final class Ping
{
    /**
     * Changes nothing. The first problem is the last line.
     *
     * @return list<array{ok: bool, text: string}> what is right, and the problem with what to change
     */
    public static function run(Client $client, string $url): array
    {
        try {
            $ready = $client->ready();
        } catch (ConnectionFailed $failure) {
            return [self::problem("{$failure->getMessage()} Start chatd, or set CHATD_URL (now $url) to its api.bind.")];
        } catch (ChatdException) {
            return [self::problem("What answers at $url is not chatd's API. Set CHATD_URL to chatd's api.bind (port 8080).")];
        }
        $lines = [['ok' => true, 'text' => "chatd answers at $url."]];
        try {
            $client->user(1);
        } catch (Unauthorized) {
            return [...$lines, self::problem("chatd refuses the token. Set CHATD_INTERNAL_TOKEN to chatd's api.internal_token.")];
        } catch (ChatdException $failure) {
            return [...$lines, self::problem("chatd takes the token, and cannot answer: {$failure->getMessage()}")];
        }
        $lines[] = ['ok' => true, 'text' => 'chatd takes the token.'];
        $wrong = array_keys(array_diff($ready['checks'], ['ok']));
        if ($ready['status'] === 'ok') {
            return [...$lines, ['ok' => true, 'text' => 'chatd is ready.']];
        }

        return [...$lines, self::problem("chatd is {$ready['status']} (".implode(', ', $wrong).'). Run `chatd doctor` on its machine.')];
    }

    /** @return array{ok: bool, text: string} */
    private static function problem(string $text): array
    {
        return ['ok' => false, 'text' => $text];
    }
}
