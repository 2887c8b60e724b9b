"""The use cases, which the API and the hub share. Each module has one subject.

logins         verify a token, check that the login is still valid
conversations  enter a conversation, the inbox
messages       post, send, edit, delete, react, history
members        add and remove members
receipts       read and delivered cursors, the delivery of a message
users          state of a user, disconnect, revoke, ban
presence       users with connections, on all nodes
typing         users who are typing now
events         an application's own events for a room
"""
