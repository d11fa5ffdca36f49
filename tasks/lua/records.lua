-- Shared by every ledger script: it is put in front of each of them. Refuses to know Celery, HTTP or tokens.
--
-- KEYS[1] is the prefix "{namespace}:". It is no key itself; its hash tag puts all keys below into one slot.
--   job:<id>              hash    the job's record; an absent value is ''
--   events:<id>           stream  event n has the id (n+1)-0 and one field e, a JSON object without its number
--   ages:<model>          zset    id -> created ms, of the waiting jobs; in which order they are claimed: queue.lua
--   running:<model>       zset    id -> ms of the claim
--   leases                zset    id -> ms at which the claim is lost
--   deadlines             zset    id -> ms at which a waiting job expires
--   finished              zset    id -> ms of the end, but for dead letters
--   dead                  zset    id -> ms of the end, of dead letters
--   dead:<tenant>         zset    id -> seq, of dead letters
--   tries:<id>            list    JSON, how the last twenty attempts ended that took others or themselves down
--   output:<key>          string  a file that a run of a job made; dies by itself unless `complete` keeps it
--   ended                 stream  the last thousand ends or so, field id: one reader serves all who wait for ends
--   jobs:<tenant>         zset    id -> seq, every job
--   in:<state>:<tenant>   zset    id -> seq, the jobs in one state
--   idem:<digest>         string  the job that an idempotency key made
--   claim:<worker>:<token>  string  "<fence> <id>", what a claim gave; dies after ten minutes
--   gone:<id>             string  the token that deleted the job; dies after a minute
--   pace:<model>          hash    how fast the model's jobs end: queue.lua
--   models                set     models that have or had jobs
--   reaper                hash    asked_ms (the last call of reap), not_before_ms (it takes nothing before)
--   server                hash    run_id, noted_ms (which Redis, and when that was noted last), failovers: server.lua
--   seq                   string  counter that numbers jobs by age
--   signing               string  what urls of files are signed with (roster.py)
-- Time is the server's own (TIME), so no clock of a worker can shorten or stretch a lease.
-- ERRORS (code -> JSON text) is made from errors.py and stands in front of this file.

local P = KEYS[1]
local tell -- webhooks: outbox.lua, which follows, says what it does
local settle -- quotas: quotas.lua
local unqueue, enqueue -- out of and into the order of claims: queue.lua
local NOW, NOW_US
do
  local time = redis.call('TIME')
  NOW = time[1] * 1000 + math.floor(time[2] / 1000)
  NOW_US = time[1] * 1000000 + time[2]
end

local FIELDS = {'state', 'model', 'tenant', 'seq', 'fence', 'place', 'priority', 'deadline_ms', 'start_timeout_ms',
  'created_ms', 'started_ms', 'claimed_ms', 'deaths', 'attempts', 'next_seq', 'worker', 'done_fence', 'idem', 'suspect',
  'batch', 'cost', 'affinity', 'bytes', 'tokens'}
local TERMINAL = {completed = true, failed = true, cancelled = true, expired = true, incomplete = true}

local function number(value)
  if not value or value == '' then return nil end
  return tonumber(value)
end

local function whole(value)
  return string.format('%.0f', value)
end

local function load(id)
  local values = redis.call('HMGET', P .. 'job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {id = id, key = P .. 'job:' .. id}
  for i, name in ipairs(FIELDS) do job[name] = values[i] or '' end
  return job
end

local function load_for(id, tenant)
  local job = load(id)
  if job and tenant ~= '' and job.tenant ~= tenant then return nil end
  return job
end

-- One page of a list. `entries`: members and scores as the index gave them, at most `scan` members; `show` answers what
-- is said of a member, or nil where it does not match.
-- Answers {score to go on from or '', what is said of each}
local function page_of(entries, limit, scan, show)
  local page = {''}
  for i = 1, #entries, 2 do
    page[#page + 1] = show(entries[i])
    if #page > limit then
      page[1] = entries[i + 1]
      return page
    end
  end
  if #entries == 2 * scan then page[1] = entries[#entries] end
  return page
end

-- Greater than the last fence, and the microsecond of the claim: a server that took over from one that it lagged behind
-- does not know the last fences that the other gave, and gives none of them again.
local function next_fence(last)
  return whole(math.max(tonumber(last) + 1, NOW_US))
end

local function held(job, fence)
  return (job.state == 'in_progress' or job.state == 'cancelling') and job.fence == fence
end

-- When a waiting job expires, and the code it expires with. A job that once started has met its start_timeout.
local function expiry(job)
  local at, code = number(job.deadline_ms), 'deadline_exceeded'
  local patience = number(job.start_timeout_ms)
  if patience and job.started_ms == '' then
    local start_by = tonumber(job.created_ms) + patience
    if not at or start_by < at then at, code = start_by, 'start_timeout' end
  end
  return at, code
end

local function overdue(job)
  local deadline = number(job.deadline_ms)
  return deadline ~= nil and deadline <= NOW
end

local function emit(job, event)
  local n = number(job.next_seq) or 0
  redis.call('XADD', P .. 'events:' .. job.id, whole(n + 1) .. '-0', 'e', event)
  job.next_seq = whole(n + 1)
  redis.call('HSET', job.key, 'next_seq', job.next_seq)
end

local function move(job, state)
  redis.call('ZREM', P .. 'in:' .. job.state .. ':' .. job.tenant, job.id)
  redis.call('ZADD', P .. 'in:' .. state .. ':' .. job.tenant, job.seq, job.id)
  redis.call('HSET', job.key, 'state', state)
  job.state = state
end

local function unclaim(job)
  redis.call('ZREM', P .. 'running:' .. job.model, job.id)
  redis.call('ZREM', P .. 'leases', job.id)
end

local function drop_files(keys)
  for _, key in ipairs(keys) do redis.call('UNLINK', P .. 'output:' .. key) end
end

local function or_null(json)
  if json == nil or json == '' then return 'null' end
  return json
end

-- The only way into a terminal state. `result` holds JSON texts: response, error, usage, metrics, outputs; and
-- output_keys, the keys of its files in this Redis with a space between them.
local function finish(job, state, result)
  if job.state == 'queued' then unqueue(job) else unclaim(job) end
  local fence = job.fence
  move(job, state)
  redis.call('HSET', job.key, 'finished_ms', whole(NOW), 'done_fence', fence, 'response', result.response or '',
    'error', result.error or '', 'usage', result.usage or '', 'metrics', result.metrics or '',
    'dead_letter', result.dead_letter or '', 'outputs', result.outputs or '', 'output_keys', result.output_keys or '')
  if result.dead_letter then
    redis.call('ZADD', P .. 'dead', whole(NOW), job.id)
    redis.call('ZADD', P .. 'dead:' .. job.tenant, job.seq, job.id)
  else
    redis.call('ZADD', P .. 'finished', whole(NOW), job.id)
  end
  settle(job, result.usage or '')
  redis.call('XADD', P .. 'ended', 'MAXLEN', '~', 1000, '*', 'id', job.id)
  emit(job, '{"type":"job.' .. state .. '","status":"' .. state .. '","error":' .. or_null(result.error) ..
    ',"usage":' .. or_null(result.usage) ..
    ((result.outputs or '') ~= '' and ',"outputs":' .. result.outputs or '') .. '}')
  tell(job, state, ((result.outputs or '') ~= '' and ',"outputs":' .. result.outputs or '') ..
    ((result.error or '') ~= '' and #result.error < 2000 and ',"error":' .. result.error or ''))
end

-- Out of the lists of ended jobs.
local function unfinish(job)
  redis.call('ZREM', P .. 'finished', job.id)
  redis.call('ZREM', P .. 'dead', job.id)
  redis.call('ZREM', P .. 'dead:' .. job.tenant, job.id)
end

-- For whoever looks into a dead letter. how: lost (its worker or engine) | crowd (its engine, with others in it)
local function note_try(job, how, reason)
  local key = P .. 'tries:' .. job.id
  redis.call('RPUSH', key, cjson.encode({attempt = tonumber(job.attempts), worker = job.worker, how = how,
    claimed_ms = tonumber(job.claimed_ms), ended_ms = NOW, reason = reason}))
  redis.call('LTRIM', key, -20, -1)
end

-- A claim that ends without a result: the fence moves at once, so the old holder can change nothing any more.
local function take_back(job)
  unclaim(job)
  job.fence = next_fence(job.fence)
  redis.call('HSET', job.key, 'fence', job.fence, 'progress', '')
end

local function requeue(job, reason)
  move(job, 'queued')
  enqueue(job, '{"type":"job.queued","status":"queued","reason":"' .. reason .. '"}')
end

-- No death, and the attempt does not count as one.
local function hand_back(job, reason)
  take_back(job)
  redis.call('HSET', job.key, 'attempts', whole(tonumber(job.attempts) - 1))
  if job.state == 'cancelling' then
    finish(job, 'cancelled', {error = ERRORS.cancelled})
  else
    requeue(job, reason)
  end
end

-- Tokens of what was published last: not only one, since a double that the network held back may arrive after the next
-- call.
local function tokens_of(job)
  local tokens = {}
  for seen in string.gmatch(redis.call('HGET', job.key, 'published') or '', '%S+') do
    tokens[#tokens + 1], tokens[seen] = seen, true
  end
  return tokens
end

-- A holder whose last words are not in the log: this server took over from one that it lagged behind. What the holder
-- says next would leave a hole, so the job is taken from it and goes on from the log as it is. `last`: the token, or ''
local function lost_words(job, last)
  if last == '' or tokens_of(job)[last] then return false end
  hand_back(job, 'events_lost')
  return true
end

-- The holder is gone. Answers requeued, dead, cancelled or expired.
local function bury_or_requeue(job, max_deaths, reason)
  note_try(job, 'lost', reason)
  take_back(job)
  job.deaths = whole(tonumber(job.deaths) + 1)
  redis.call('HSET', job.key, 'deaths', job.deaths)
  if job.state == 'cancelling' then
    finish(job, 'cancelled', {error = ERRORS.cancelled})
    return 'cancelled'
  end
  if overdue(job) then
    finish(job, 'expired', {error = ERRORS.deadline_exceeded})
    return 'expired'
  end
  if tonumber(job.deaths) >= max_deaths then
    finish(job, 'failed', {error = ERRORS.worker_lost, dead_letter = '1'})
    return 'dead'
  end
  requeue(job, 'worker_lost')
  return 'requeued'
end

local function purge(job)
  local files = {}
  for key in string.gmatch(redis.call('HGET', job.key, 'output_keys') or '', '%S+') do files[#files + 1] = key end
  drop_files(files)
  redis.call('UNLINK', job.key, P .. 'events:' .. job.id, P .. 'tries:' .. job.id)
  if job.idem ~= '' then redis.call('DEL', P .. 'idem:' .. job.idem) end
  redis.call('ZREM', P .. 'jobs:' .. job.tenant, job.id)
  redis.call('ZREM', P .. 'in:' .. job.state .. ':' .. job.tenant, job.id)
  unfinish(job)
end
