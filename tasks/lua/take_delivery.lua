-- Give the delivery that is due to a sender. Writes delivery, queue, sending, outbox, sender, hook_secret.
-- ARGV: token, lease_ms, a fresh secret for a tenant that has none for the urls of its jobs
-- Answers {'none'} | {'take', id, fence, event, type, body, url, tenant, attempts, tries, secret, old secret or '',
--   now_ms}
local token_key = P .. 'sender:' .. ARGV[1]
local lease_ms, fresh_secret = tonumber(ARGV[2]), ARGV[3]
local FIELDS_SENT = {'fence', 'event', 'type', 'body', 'url', 'tenant', 'attempts', 'tries', 'endpoint'}

local function secrets(endpoint, tenant)
  local key = endpoint ~= '' and P .. 'endpoint:' .. endpoint or P .. 'hook_secret:' .. tenant
  if endpoint == '' then redis.call('HSETNX', key, 'secret', fresh_secret) end
  local seen = redis.call('HMGET', key, 'secret', 'old_secret', 'old_until_ms', 'url')
  local rotating = (number(seen[3]) or 0) > NOW
  return seen[1], rotating and seen[2] or '', seen[4]
end

-- nil if its endpoint is gone.
local function answer(id)
  local seen = redis.call('HMGET', P .. 'delivery:' .. id, unpack(FIELDS_SENT))
  local secret, old, url = secrets(seen[9], seen[6])
  if not secret then return nil end
  return {'take', id, seen[1], seen[2], seen[3], seen[4], seen[9] ~= '' and url or seen[5], seen[6], seen[7], seen[8],
    secret, old, whole(NOW)}
end

-- As in claim.lua: a token gives once.
local used = redis.call('GET', token_key)
if used then
  local fence, id = string.match(used, '^(%d+) (.*)$')
  local seen = redis.call('HMGET', P .. 'delivery:' .. id, 'fence', 'receiver')
  local held = seen[1] == fence and redis.call('ZSCORE', P .. 'sending:' .. seen[2], id)
  return held and answer(id) or {'none'}
end

-- Its sender is gone: what it tried counts, whatever came of it, so that no delivery can end senders for ever.
local function take_back_lost(receiver)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'sending:' .. receiver, '-inf', whole(NOW), 'LIMIT', 0, 100)) do
    redis.call('ZREM', P .. 'sending:' .. receiver, id)
    redis.call('HINCRBY', P .. 'delivery:' .. id, 'attempts', 1)
    redis.call('HSET', P .. 'delivery:' .. id, 'last_error', 'sender_lost', 'last_status', '', 'last_ms', whole(NOW))
    redis.call('ZADD', P .. 'queue:' .. receiver, whole(NOW), id)
  end
end

local function next_of(receiver)
  local health = redis.call('HMGET', P .. 'receiver:' .. receiver, 'open_until_ms', 'disabled')
  if (health[2] or '') ~= '' or (number(health[1]) or 0) > NOW then return nil end
  if redis.call('ZCARD', P .. 'sending:' .. receiver) >= HOOK_IN_FLIGHT then return nil end
  return redis.call('ZRANGEBYSCORE', P .. 'queue:' .. receiver, '-inf', whole(NOW), 'LIMIT', 0, 1)[1]
end

for _ = 1, 32 do
  local receiver = redis.call('ZRANGEBYSCORE', P .. 'outbox', '-inf', whole(NOW), 'LIMIT', 0, 1)[1]
  if not receiver then return {'none'} end
  take_back_lost(receiver)
  local id = next_of(receiver)
  if id then
    redis.call('ZREM', P .. 'queue:' .. receiver, id)
    local fence = next_fence(redis.call('HGET', P .. 'delivery:' .. id, 'fence') or '0')
    redis.call('HSET', P .. 'delivery:' .. id, 'fence', fence)
    local given = answer(id)
    if given then
      redis.call('ZADD', P .. 'sending:' .. receiver, whole(NOW + lease_ms), id)
      redis.call('SET', token_key, fence .. ' ' .. id, 'PX', 600000)
      rescore(receiver)
      return given
    end
    redis.call('HSET', P .. 'delivery:' .. id, 'state', 'failed', 'last_error', 'endpoint_deleted',
      'ended_ms', whole(NOW))
  end
  rescore(receiver)
end
return {'none'}
