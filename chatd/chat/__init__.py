"""The use cases: what the API and the hub both call, a module per noun.

logins         who is it, and does that still count
conversations  enter one, the inbox
messages       post, send, edit, delete, react, history
members        add, remove
receipts       read and delivered cursors, who lacks a message
users          who is there, send away, revoke, ban
presence       who is connected, over all nodes
typing         who is writing just now
events         an application's own, to a room
"""
