-- Write down how an attempt went. Writes delivery, queue, sending, outbox, receiver, forget_deliveries.
-- ARGV: id, fence, event (that was sent), outcome, status, error, answer, delay_ms, pause_ms, keep_ms
--   outcome: delivered | again (after delay_ms) | failed (for good) | gone (nor does its receiver want any other)
--   pause_ms: the receiver asked that nothing come before; keep_ms: how long the record of an ended delivery lives
-- Answers delivered | again | failed | parked | same | stale, and then why the receiver was disabled just now, or ''
local id, fence, outcome = ARGV[1], ARGV[2], ARGV[4]
local key = P .. 'delivery:' .. id
local seen = redis.call('HMGET', key, 'fence', 'receiver', 'done_fence', 'slot', 'event', 'endpoint')
if not seen[1] then return {'stale', ''} end
if seen[3] == fence then return {'same', ''} end
local receiver, testing = seen[2], string.sub(seen[2], -5) == ':test'
if seen[1] ~= fence or redis.call('ZREM', P .. 'sending:' .. receiver, id) == 0 then return {'stale', ''} end

local BREAKER_FAILURES, BREAKER_MS, BREAKER_MAX_MS = 10, 60000, 3600000
local FAILING_MS = 5 * 86400 * 1000

-- Counts a failure. Answers why the receiver is disabled from now on, or ''.
local function health_suffers()
  local health = P .. 'receiver:' .. receiver
  local failures = redis.call('HINCRBY', health, 'failures', 1)
  redis.call('HSETNX', health, 'failing_since_ms', whole(NOW))
  local open_ms = tonumber(ARGV[9])
  if failures >= BREAKER_FAILURES then
    open_ms = math.max(open_ms, math.min(BREAKER_MAX_MS, BREAKER_MS * 2 ^ (failures - BREAKER_FAILURES)))
  end
  if open_ms > 0 then redis.call('HSET', health, 'open_until_ms', whole(NOW + open_ms)) end
  -- A url that no endpoint stands for cannot be enabled by anybody: it is forgotten, and so tried again, in a while.
  if seen[6] == '' then redis.call('PEXPIRE', health, HOOK_KEEP_MS) end
  local state = redis.call('HMGET', health, 'disabled', 'failing_since_ms')
  if (state[1] or '') ~= '' then return '' end
  local why = outcome == 'gone' and 'gone' or ''
  if why == '' and failures >= BREAKER_FAILURES and NOW - tonumber(state[2]) >= FAILING_MS then why = 'failing' end
  if why ~= '' then redis.call('HSET', health, 'disabled', why) end
  return why
end

local function ended(state)
  redis.call('HSET', key, 'state', state, 'ended_ms', whole(NOW))
  redis.call('ZADD', P .. 'forget_deliveries', whole(NOW + tonumber(ARGV[10])), id)
  return state
end

local disabled = ''
if outcome == 'delivered' then
  redis.call('DEL', P .. 'receiver:' .. receiver)
elseif not testing then
  disabled = health_suffers()
end
redis.call('HSET', key, 'done_fence', fence, 'last_status', ARGV[5], 'last_error', ARGV[6], 'last_answer', ARGV[7],
  'last_ms', whole(NOW))
redis.call('HINCRBY', key, 'attempts', 1)

local word
if seen[4] ~= '' then
  -- Progress is not kept. What took its place while it was on its way follows.
  word = outcome == 'delivered' and 'delivered' or 'failed'
  if seen[5] == ARGV[3] or outcome == 'gone' then
    forget_delivery(id)
  else
    redis.call('HSET', key, 'attempts', '0')
    queue_delivery(id, receiver, NOW + HOOK_PROGRESS_GAP_MS)
  end
elseif outcome == 'again' then
  word = 'again'
  queue_delivery(id, receiver, NOW + tonumber(ARGV[8]))
elseif outcome == 'gone' and seen[6] ~= '' and not testing then
  word = 'parked'
  queue_delivery(id, receiver, NOW)
else
  word = ended(outcome == 'delivered' and 'delivered' or 'failed')
end
rescore(receiver)
return {word, disabled}
