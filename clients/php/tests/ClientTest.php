<?php

declare(strict_types=1);

namespace Chatd\Tests;

use Chatd\Client;
use Chatd\Exceptions\ChatdException;
use Chatd\Exceptions\Conflict;
use Chatd\Exceptions\Invalid;
use Chatd\Exceptions\NotFound;
use Chatd\Exceptions\Unauthorized;
use Chatd\Stored;
use DateTimeImmutable;
use InvalidArgumentException;

/** Each call, answered by a real chatd. */
final class ClientTest extends TestCase
{
    public function testAKeyStoresOnceAndReachesNoOtherPost(): void
    {
        foreach (self::transports() as $name => [$transport]) {
            [$chatd, $room] = [self::client($transport), self::id()];
            $first = $chatd->post($room, 5, 'OK', key: "job-$name");
            $again = $chatd->post($room, 5, 'OK', key: "job-$name");
            self::assertSame([$first->id, true], [$again->id, $again->duplicate]);
            $next = $chatd->post($room, 5, 'OK');
            $last = $chatd->post($room, 5, 'OK');
            self::assertSame([2, 3, false], [$next->seq, $last->seq, $last->duplicate]);
            $conflict = self::thrown(Conflict::class, fn () => $chatd->post($room, 5, 'No', key: "job-$name"));
            self::assertSame(['conflict', 409], [$conflict->error, $conflict->status]);
        }
    }

    public function testAMessageArrivesAsItWasPosted(): void
    {
        [$chatd, $room] = [self::client(), self::id()];
        $meta = ['emoji' => '👍', 'n' => 1.0, 'list' => [], 'deep' => ['a' => null]];
        $first = $chatd->post($room, 5, "tiếng\n\"Việt\"", 'note', $meta);
        $chatd->post($room, 7, 'yes', meta: [], replyTo: $first->id, key: "ключ\r\nX: y");
        $page = $chatd->history($room);
        self::assertFalse($page['has_more']);
        [$one, $two] = $page['messages'];
        self::assertSame(["tiếng\n\"Việt\"", 'note'], [$one['content'], $one['type']]);
        self::assertSame($meta, $one['meta']);
        self::assertSame([[], $first->id, "ключ\r\nX: y"], [$two['meta'], $two['reply_to'], $two['client_id']]);
        self::assertSame($first->createdAt, $one['created_at']);
        self::assertSame([$two], $chatd->history($room, after: $first->id)['messages']);
        self::assertSame([$one], $chatd->history($room, before: $two['id'], limit: 1)['messages']);
    }

    public function testARefusalNamesItsCodeAndField(): void
    {
        $chatd = self::client();
        $invalid = self::thrown(Invalid::class, fn () => $chatd->post(self::id(), 0, 'x'));
        self::assertSame(['bad_request', 422, 'sender_id'], [$invalid->error, $invalid->status, $invalid->field()]);
        self::assertSame([$invalid->getMessage()], $invalid->errors['sender_id']);
        $long = self::thrown(Invalid::class, fn () => $chatd->post(self::id(), 5, str_repeat('x', 9000)));
        self::assertSame(['too_large', 'content'], [$long->error, $long->field()]);
        self::thrown(Invalid::class, fn () => $chatd->post(self::id(), 5, str_repeat('x', 3_000_000)));
        self::thrown(NotFound::class, fn () => $chatd->delete(999_999));
        $stranger = new Client(self::url(), 'wrong');
        self::assertSame(401, self::thrown(Unauthorized::class, fn () => $stranger->user(5))->status);
        self::thrown(InvalidArgumentException::class, fn () => new Client(self::url(), ''));
    }

    public function testABatchAnswersForEachMessage(): void
    {
        [$chatd, $room] = [self::client(), self::id()];
        $messages = [
            3 => ['conversation_id' => $room, 'sender_id' => 5, 'content' => 'a', 'client_id' => 'k'],
            7 => ['conversation_id' => $room, 'sender_id' => 0, 'content' => 'b'],
            9 => ['conversation_id' => $room, 'sender_id' => 5, 'content' => 'c'],
        ];
        [$a, $b, $c] = $chatd->batch($messages);
        self::assertInstanceOf(Stored::class, $a);
        self::assertInstanceOf(Invalid::class, $b);
        self::assertSame('sender_id', $b->field());
        self::assertInstanceOf(Stored::class, $c);
        self::assertTrue($chatd->batch([$messages[3]])[0]->duplicate);
    }

    public function testAMessageIsEditedAndDeleted(): void
    {
        [$chatd, $room] = [self::client(), self::id()];
        $chatd->addMember($room, 7);
        $id = $chatd->post($room, 5, 'Hello', meta: ['a' => 1])->id;
        self::assertSame([7], $chatd->delivery($id)['pending']);
        self::assertSame(2, $chatd->edit($id, ['content' => 'Bye']));
        self::assertSame(3, $chatd->edit($id, ['meta' => null]));
        $message = $chatd->history($room)['messages'][0];
        self::assertSame(['Bye', null], [$message['content'], $message['meta']]);
        self::assertSame(4, $chatd->delete($id));
        self::thrown(NotFound::class, fn () => $chatd->delete($id));
        self::thrown(Invalid::class, fn () => $chatd->edit($id, []));
    }

    public function testMembersCome(): void
    {
        [$chatd, $room] = [self::client(), self::id()];
        $until = new DateTimeImmutable('2999-01-01T12:00:00.5+07:00');
        $chatd->addMember($room, 5, 'moderator');
        $chatd->addMember($room, 5);
        $chatd->addMember($room, 6);
        $chatd->mute($room, 6, $until);
        [$five, $six] = $chatd->conversation($room)['members'];
        self::assertSame(['moderator', null], [$five['role'], $six['role']]);
        self::assertEquals($until, new DateTimeImmutable($six['muted_until']));
        $chatd->unmute($room, 6);
        $chatd->setRole($room, 5, null);
        $chatd->setRole($room, 6, 'guest');
        [$five, $six] = $chatd->conversation($room)['members'];
        self::assertSame([null, null, 'guest'], [$five['role'], $six['muted_until'], $six['role']]);
        $chatd->removeMember($room, 5);
        $chatd->removeMember($room, 6, ban: true);
        self::assertSame(0, $chatd->conversation($room)['members_count']);
    }

    public function testUnreadMessagesAreCounted(): void
    {
        [$chatd, $room, $other, $user] = [self::client(), self::id(), self::id(), self::id() + 5000];
        $chatd->addMember($room, $user);
        $chatd->addMember($other, $user);
        $chatd->post($room, 5, 'one');
        $chatd->post($room, 5, 'two');
        self::assertSame(2, $chatd->unread($user)[$room]);
        self::assertSame(0, $chatd->unread($user)[$other]);
        self::assertFalse($chatd->user($user)['online']);
    }

    public function testUsersAreKickedBannedAndRevoked(): void
    {
        [$chatd, $user] = [self::client(), self::id() + 5000];
        self::assertSame(0, $chatd->kick($user));
        self::assertSame(0, $chatd->kick($user, reconnect: true));
        $chatd->ban($user, new DateTimeImmutable('+1 hour'));
        $chatd->ban($user);
        $chatd->unban($user);
        $chatd->revoke($user);
        $chatd->revoke($user, new DateTimeImmutable('-1 hour'));
        $token = $chatd->token($user, ttl: 600, conversations: [3 => 1]);
        self::assertSame([600, 3], [$token->expiresIn, count(explode('.', (string) $token))]);
        self::thrown(Invalid::class, fn () => $chatd->token(0));
    }

    public function testAnEventOfOnesOwnIsSent(): void
    {
        [$chatd, $room] = [self::client(), self::id()];
        $chatd->event($room, 'call.started', ['by' => 5]);
        $chatd->event($room, 'call.started', userIds: [4 => 5]);
        $refusal = self::thrown(ChatdException::class, fn () => $chatd->event($room, 'message'));
        self::assertSame('event', $refusal->field());
    }
}
