<?php

declare(strict_types=1);

namespace Chatd;

use Chatd\Exceptions\ChatdException;
use Chatd\Exceptions\RateLimited;
use Chatd\Exceptions\Unavailable;
use DateTimeInterface;
use InvalidArgumentException;
use stdClass;

/**
 * chatd's HTTP API, as a backend uses it. Shapes of arrays are those of docs/http.md.
 *
 * It keeps no state, so one may serve all requests and jobs. Each method throws a ChatdException.
 *
 * @phpstan-type Message array{conversation_id: int, id: int, user_id: int, type: string, content: ?string, meta: mixed,
 *     created_at: string, seq: int, client_id: ?string, reply_to?: int, edited_at?: string, deleted_at?: string}
 */
final class Client
{
    private const JSON = JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION;

    private const FIRST_WAIT = 0.1; // seconds before the second attempt, four times as long before each next one

    private const LONGEST_WAIT = 2.0; // a request of a web page must not hang

    private readonly string $url;

    public function __construct(
        string $url,
        #[\SensitiveParameter] private readonly string $token,
        private readonly Transport $transport = new StreamTransport(),
        private readonly int $attempts = 3,
    ) {
        if ($token === '') {
            throw new InvalidArgumentException("The token is empty; set CHATD_INTERNAL_TOKEN to chatd's api.internal_token.");
        }
        $this->url = rtrim($url, '/');
    }

    // Messages.

    /**
     * Store a message and deliver it. The sender becomes a member.
     *
     * @param  string|null  $key  at most 64 characters: a post with the same key never makes a second message. Give
     *     one that a repeated job has again (`$this->job->uuid()`). Without it each call makes its own.
     */
    public function post(
        int $conversationId,
        int $senderId,
        string $content,
        string $type = 'text',
        mixed $meta = null,
        ?int $replyTo = null,
        ?string $key = null,
    ): Stored {
        return Stored::from($this->request('POST', '/messages', [
            'conversation_id' => $conversationId,
            'sender_id' => $senderId,
            'content' => $content,
            'type' => $type,
            'client_id' => $key ?? self::key(),
        ] + self::present(['meta' => $meta, 'reply_to' => $replyTo])));
    }

    /**
     * Store up to 1,000 messages. chatd accepts or refuses each on its own; a refusal is returned, not thrown.
     *
     * @param  list<array<string, mixed>>  $messages  `conversation_id`, `sender_id`, `content`, and `type`, `meta`,
     *     `reply_to`, `client_id` (the key) if there is one
     * @return list<Stored|ChatdException> in the order of the messages
     */
    public function batch(array $messages): array
    {
        $keyed = array_map(fn (array $message) => $message + ['client_id' => self::key()], array_values($messages));

        return array_map(
            fn (array $one) => isset($one['code']) ? ChatdException::from($one) : Stored::from($one),
            $this->request('POST', '/messages/batch', ['messages' => $keyed])['results'],
        );
    }

    /**
     * Change the `content` or the `meta` of a message; a field that is left out stays. Returns the change's `seq`.
     *
     * @param  array{content?: string, meta?: mixed}  $changes
     */
    public function edit(int $messageId, array $changes): int
    {
        return $this->request('PATCH', "/messages/$messageId", $changes)['seq'];
    }

    /** Remove the content of a message. Returns the change's `seq`. Throws NotFound if it was deleted before. */
    public function delete(int $messageId): int
    {
        return $this->request('DELETE', "/messages/$messageId")['seq'];
    }

    /**
     * Who has read and received a message, and who needs a push (`pending`). Lists of user ids.
     *
     * @return array{read: list<int>, delivered: list<int>, online: list<int>, pending: list<int>}
     */
    public function delivery(int $messageId): array
    {
        return $this->request('GET', "/messages/$messageId/delivery");
    }

    // Conversations.

    /**
     * A page of messages in ascending id: the newest, or those next to the message `before` or `after`.
     *
     * @return array{messages: list<Message>, has_more: bool}
     */
    public function history(int $conversationId, ?int $before = null, ?int $after = null, ?int $limit = null): array
    {
        $query = self::present(compact('before', 'after', 'limit'));

        return $this->request('GET', "/conversations/$conversationId/messages", query: $query);
    }

    /**
     * Its newest change, its members, how far they have read, and who is online.
     *
     * @return array<string, mixed> a ConversationState
     */
    public function conversation(int $conversationId): array
    {
        return $this->request('GET', "/conversations/$conversationId");
    }

    /** Add a member, or restore a removed one. `moderator` may change the messages of others. */
    public function addMember(int $conversationId, int $userId, ?string $role = null): void
    {
        $this->member($conversationId, $userId, self::present(['role' => $role]));
    }

    /** Give a member another role, or none. */
    public function setRole(int $conversationId, int $userId, ?string $role): void
    {
        $this->member($conversationId, $userId, ['role' => $role]);
    }

    /** Let a member read and not write until then. */
    public function mute(int $conversationId, int $userId, DateTimeInterface $until): void
    {
        $this->member($conversationId, $userId, ['muted_until' => self::time($until)]);
    }

    public function unmute(int $conversationId, int $userId): void
    {
        $this->member($conversationId, $userId, ['muted_until' => null]);
    }

    /** Remove a member; `$ban` notes it as a ban. Within a second the user gets nothing more of the room. */
    public function removeMember(int $conversationId, int $userId, bool $ban = false): void
    {
        $query = $ban ? ['ban' => 1] : [];
        $this->request('DELETE', "/conversations/$conversationId/members/$userId", query: $query);
    }

    /**
     * Send an event of your own to who is in the room at this moment. chatd does not store it, so it is not repeated
     * after a failure.
     *
     * @param  list<int>|null  $userIds  only these
     */
    public function event(int $conversationId, string $event, mixed $data = null, ?array $userIds = null): void
    {
        $body = ['event' => $event, 'data' => $data];
        $body += self::present(['user_ids' => $userIds === null ? null : array_values($userIds)]);
        $this->request('POST', "/conversations/$conversationId/events", $body, repeatable: false);
    }

    // Users.

    /**
     * Whether a user is online, and the unread messages of each conversation.
     *
     * @return array{user_id: int, online: bool, connections: int,
     *     conversations: list<array{conversation_id: int, seq: int, unread: int}>}
     */
    public function user(int $userId): array
    {
        return $this->request('GET', "/users/$userId");
    }

    /**
     * How many messages of each conversation a user has not read; counted up to 1,000.
     *
     * @return array<int, int> by the conversation's id
     */
    public function unread(int $userId): array
    {
        return array_column($this->user($userId)['conversations'], 'unread', 'conversation_id');
    }

    /** Close a user's connections. The tokens stay valid; see `revoke`. Returns how many were closed. */
    public function kick(int $userId, bool $reconnect = false): int
    {
        return $this->request('POST', "/users/$userId/disconnect", ['reconnect' => $reconnect])['closed'];
    }

    /** Void the tokens that were issued before then, or before now, and close the connections made with them. */
    public function revoke(int $userId, ?DateTimeInterface $before = null): void
    {
        $body = self::present(['before' => $before === null ? null : self::time($before)]);
        // Without a time a second attempt would void what was issued since the first.
        $this->request('POST', "/users/$userId/revoke", $body, repeatable: $before !== null);
    }

    /** Keep a user out of all conversations, until then or for ever. */
    public function ban(int $userId, ?DateTimeInterface $until = null): void
    {
        $this->request('PUT', "/users/$userId/ban", self::present(['until' => $until === null ? null : self::time($until)]));
    }

    public function unban(int $userId): void
    {
        $this->request('DELETE', "/users/$userId/ban");
    }

    /**
     * Have chatd issue a token for a user. To sign tokens without asking chatd, see TokenSigner.
     *
     * @param  int|null  $ttl  seconds
     * @param  list<int>|null  $conversations  which the token opens without a membership
     */
    public function token(int $userId, ?int $ttl = null, ?array $conversations = null): Token
    {
        $list = $conversations === null ? null : array_values($conversations);
        $body = ['user_id' => $userId] + self::present(['ttl' => $ttl, 'conversations' => $list]);
        $found = $this->request('POST', '/tokens', $body);

        return new Token($found['token'], $found['expires_in']);
    }

    // Health.

    /**
     * Whether chatd can store messages: `ok`, `degraded`, `unavailable` or `stopping`, and the state of each part.
     *
     * @return array{status: string, checks: array<string, string>}
     */
    public function ready(): array
    {
        $response = $this->transport->send('GET', "{$this->url}/readyz", ['Accept' => 'application/json'], '');
        $found = $response->json();
        if (! isset($found['status'], $found['checks'])) {
            throw ChatdException::of($response);
        }

        return $found;
    }

    /** @param  array<string, mixed>  $body */
    private function member(int $conversationId, int $userId, array $body): void
    {
        $this->request('PUT', "/conversations/$conversationId/members/$userId", $body);
    }

    /**
     * @param  array<string, mixed>|null  $body
     * @param  array<string, int>  $query
     * @param  bool  $repeatable  whether a second attempt, after a first that may have succeeded, changes nothing
     * @return array<string, mixed>
     */
    private function request(
        string $method,
        string $path,
        ?array $body = null,
        array $query = [],
        bool $repeatable = true,
    ): array {
        $url = "{$this->url}/api/ws$path".($query ? '?'.http_build_query($query) : '');
        $headers = ['X-Internal-Token' => $this->token, 'Accept' => 'application/json'];
        if ($body !== null) {
            $headers['Content-Type'] = 'application/json';
        }
        $json = $body === null ? '' : json_encode($body ?: new stdClass(), self::JSON);

        for ($attempt = 1; ; $attempt++) {
            try {
                return $this->once($method, $url, $headers, $json);
            } catch (RateLimited|Unavailable $failure) {
                $wait = $failure->retryAfter ?? self::FIRST_WAIT * 4 ** ($attempt - 1);
                $again = $repeatable || $failure instanceof RateLimited || ! $failure->sent;
                if (! $again || $attempt >= $this->attempts || $wait > self::LONGEST_WAIT) {
                    throw $failure;
                }
                usleep((int) ($wait * (1 + lcg_value()) / 2 * 1e6)); // not all workers at the same moment
            }
        }
    }

    /**
     * @param  array<string, string>  $headers
     * @return array<string, mixed>
     */
    private function once(string $method, string $url, array $headers, string $json): array
    {
        $response = $this->transport->send($method, $url, $headers, $json);
        $found = $response->json();
        if ($response->status !== 200 || $found === null) {
            throw ChatdException::of($response);
        }

        return $found;
    }

    private static function key(): string
    {
        return bin2hex(random_bytes(16));
    }

    private static function time(DateTimeInterface $time): string
    {
        return $time->format('Y-m-d\TH:i:s.uP');
    }

    /**
     * @param  array<string, mixed>  $fields
     * @return array<string, mixed> those that are not null
     */
    private static function present(array $fields): array
    {
        return array_filter($fields, fn (mixed $value) => $value !== null);
    }
}
