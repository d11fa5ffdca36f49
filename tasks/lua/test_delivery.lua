-- Put an event of no job into the outbox for one endpoint, disabled or not; it is tried once.
-- ARGV: endpoint, tenant, type, nonce, data JSON. Answers nil (no such endpoint) | id; with the same nonce the same
if redis.call('HGET', P .. 'endpoint:' .. ARGV[1], 'tenant') ~= ARGV[2] then return false end
local receiver = ARGV[1] .. ':test'
local event = {tenant = ARGV[2], subject = '', type = ARGV[3], id = 'evt_' .. ARGV[4], tries = 1}
event.body = event_body(event, ARGV[5])
deliver(event, receiver, ARGV[1], '')
return delivery_id(event, receiver)
