-- In which order a model's jobs are claimed. Stands between records.lua and what uses it; knows no webhooks.
--
-- A class is a priority and a lane: '100a' = priority 0, online; '151b' = priority 51, lines of batches. The most urgent
-- class goes first. Within it every tenant has a virtual time, at which its next job starts: a claim takes the tenant
-- that is furthest behind and moves it on by the job's cost (tokens over the tenant's weight). This gives the shares of
-- a deficit round robin without its rounds. A tenant that comes, or comes back, starts at the time of the class, so
-- nobody saves up, and one that was served more than its share before it left starts later. Within a tenant the
-- earlier deadline goes first, then the older job.
-- Ageing: a class that was passed over `ageing` claims in a row goes next, the one that waits longest first.
--
-- <q> = <model>\n<class>; neither holds a line feed
--   order:<model>        hash  claims (given since the queue was empty), paused_ms ('' = not paused), and of each
--                              class n:<class> (jobs that wait) and v:<class> (its virtual time)
--   classes:<model>      zset  class -> the claim at which it was served last, or began to wait
--   turns:<q>            zset  tenant -> virtual time, of the tenants with jobs in it
--   rested:<q>           zset  the same of those without, while it is ahead of the class
--   costs:<q>            hash  tenant -> the summed cost of its jobs
--   waiting:<q>\n<tenant>  zset  every score 0; members are places, so their text is the order
--   bytes                hash  tenant -> bytes of its waiting jobs, as they were submitted
--   pace:<model>         hash  last (ms of the last end), gap (moving average of ms between ends); and while jobs waited
--                              at an end: busy_ms, busy_ends (fading sums), busy_seen (ends in all)
-- A fleet before this format had one zset waiting:<model> of places that begin with the priority; see adopt.

local PLACE_PREFIX = 13 + 1 + 16 + 1 + 8 + 1
local ADOPTED = 100

local function class_of(job)
  return string.format('%03d', tonumber(job.priority) + 100) .. (job.batch ~= '' and 'b' or 'a')
end

local function queue_of(job)
  return job.model .. '\n' .. class_of(job)
end

-- Fixed widths make the text sort by deadline, then by age. affinity: eight letters, of what a worker has warm.
local function place(job)
  local affinity = job.affinity ~= '' and job.affinity or '--------'
  return string.format('%013.0f:%016.0f:', number(job.deadline_ms) or 9999999999999, tonumber(job.seq)) ..
    affinity .. ':' .. job.id
end

local function job_at(member)
  return string.sub(member, PLACE_PREFIX + 1)
end

-- Whether the job waits where an older format put it: its place begins with three digits of priority.
local function in_old_queue(job)
  return string.sub(job.place, 4, 4) == ':'
end

-- In hundredths of a token over the tenant's weight; a job that an older version accepted has none.
local function cost_of(job)
  return number(job.cost) or 100
end

-- Bytes that wait of a tenant, for its quota. Jobs that an older version accepted are not counted.
local function count_bytes(job, sign)
  local bytes = number(job.bytes)
  local left = bytes and redis.call('HINCRBY', P .. 'bytes', job.tenant, sign * bytes)
  -- With the tenant's last waiting job the count begins anew, whatever it was.
  local last = sign < 0 and redis.call('ZCARD', P .. 'in:queued:' .. job.tenant) <= 1
  if left == 0 or last then
    redis.call('HDEL', P .. 'bytes', job.tenant)
  end
end

local function class_time(job)
  return number(redis.call('HGET', P .. 'order:' .. job.model, 'v:' .. class_of(job))) or 0
end

-- The virtual time at which a tenant's next job of this class starts.
local function turn_of(job)
  local q = queue_of(job)
  return number(redis.call('ZSCORE', P .. 'turns:' .. q, job.tenant)) or
    math.max(class_time(job), number(redis.call('ZSCORE', P .. 'rested:' .. q, job.tenant)) or 0)
end

local function take_place(job)
  local q, class, state = queue_of(job), class_of(job), P .. 'order:' .. job.model
  job.place = place(job)
  redis.call('HSET', job.key, 'place', job.place)
  redis.call('ZADD', P .. 'turns:' .. q, 'NX', turn_of(job), job.tenant)
  redis.call('ZREM', P .. 'rested:' .. q, job.tenant)
  redis.call('ZADD', P .. 'classes:' .. job.model, 'NX', redis.call('HGET', state, 'claims') or 0, class)
  redis.call('HINCRBY', state, 'n:' .. class, 1)
  redis.call('HINCRBY', P .. 'costs:' .. q, job.tenant, cost_of(job))
  redis.call('ZADD', P .. 'waiting:' .. q .. '\n' .. job.tenant, 0, job.place)
end

local function leave_place(job)
  if in_old_queue(job) then
    redis.call('ZREM', P .. 'waiting:' .. job.model, job.place)
    return
  end
  local q, class, state = queue_of(job), class_of(job), P .. 'order:' .. job.model
  redis.call('ZREM', P .. 'waiting:' .. q .. '\n' .. job.tenant, job.place)
  if redis.call('HINCRBY', state, 'n:' .. class, -1) == 0 then
    redis.call('ZREM', P .. 'classes:' .. job.model, class)
    redis.call('HDEL', state, 'n:' .. class, 'v:' .. class)
    if redis.call('EXISTS', P .. 'classes:' .. job.model) == 0 then redis.call('HDEL', state, 'claims') end
    redis.call('UNLINK', P .. 'turns:' .. q, P .. 'rested:' .. q, P .. 'costs:' .. q)
  elseif redis.call('EXISTS', P .. 'waiting:' .. q .. '\n' .. job.tenant) == 1 then
    redis.call('HINCRBY', P .. 'costs:' .. q, job.tenant, -cost_of(job))
  else
    redis.call('HDEL', P .. 'costs:' .. q, job.tenant)
    redis.call('ZADD', P .. 'rested:' .. q, redis.call('ZSCORE', P .. 'turns:' .. q, job.tenant), job.tenant)
    redis.call('ZREM', P .. 'turns:' .. q, job.tenant)
  end
end

function unqueue(job)
  leave_place(job)
  count_bytes(job, -1)
  redis.call('ZREM', P .. 'ages:' .. job.model, job.id)
  redis.call('ZREM', P .. 'deadlines', job.id)
end

function enqueue(job, event)
  redis.call('HSET', job.key, 'worker', '')
  take_place(job)
  count_bytes(job, 1)
  redis.call('ZADD', P .. 'ages:' .. job.model, job.created_ms, job.id)
  local at = expiry(job)
  if at then redis.call('ZADD', P .. 'deadlines', whole(at), job.id) end
  redis.call('SADD', P .. 'models', job.model)
  emit(job, event)
end

-- Move jobs that an older format queued into this one, some at a time; nothing is lost on the way, because every script
-- finds a job in either.
local function adopt(model)
  local old = P .. 'waiting:' .. model
  for _, member in ipairs(redis.call('ZRANGE', old, 0, ADOPTED - 1)) do
    redis.call('ZREM', old, member)
    local job = load(string.match(member, '^%d+:%d+:%d+:(.*)$'))
    take_place(job)
  end
end

local function num_waiting(model)
  return redis.call('ZCARD', P .. 'ages:' .. model)
end

-- How many turns the jobs that wait are worth. Lines of batches count as a few: where they have all the seats that they
-- may, every turn finds nothing, and who carries one goes on by itself.
local MAX_LINE_RINGS = 32
local function num_rings(model)
  local lines = 0
  for _, class in ipairs(redis.call('ZRANGE', P .. 'classes:' .. model, 0, -1)) do
    if string.sub(class, 4) == 'b' then
      lines = lines + tonumber(redis.call('HGET', P .. 'order:' .. model, 'n:' .. class))
    end
  end
  return num_waiting(model) - math.max(0, lines - MAX_LINE_RINGS)
end

local function is_paused(model)
  return (redis.call('HGET', P .. 'order:' .. model, 'paused_ms') or '') ~= ''
end

-- The class that is served next, or nil. online: only those that are no lines of batches.
local function next_class(model, online, ageing)
  local claims = number(redis.call('HGET', P .. 'order:' .. model, 'claims')) or 0
  local classes = redis.call('ZRANGE', P .. 'classes:' .. model, 0, -1, 'WITHSCORES')
  local urgent
  for i = 1, #classes, 2 do
    local class = classes[i]
    if not (online and string.sub(class, 4) == 'b') then
      if claims - tonumber(classes[i + 1]) >= ageing then return class end
      if not urgent or class < urgent then urgent = class end
    end
  end
  return urgent
end

-- The tenant whose turn it is moves on by what it gets.
local function charge(job)
  local q, class, state = queue_of(job), class_of(job), P .. 'order:' .. job.model
  local time = redis.call('ZSCORE', P .. 'turns:' .. q, job.tenant)
  redis.call('HSET', state, 'v:' .. class, time)
  redis.call('ZINCRBY', P .. 'turns:' .. q, cost_of(job), job.tenant)
  redis.call('ZREMRANGEBYSCORE', P .. 'rested:' .. q, '-inf', time)
  redis.call('ZADD', P .. 'classes:' .. job.model, redis.call('HINCRBY', state, 'claims', 1), class)
end

-- How many jobs of one other tenant start before a virtual time. Its jobs count as of equal cost.
local function num_before(q, tenant, turn, time, before_tie)
  local count = redis.call('ZCARD', P .. 'waiting:' .. q .. '\n' .. tenant)
  local each = math.max(1, tonumber(redis.call('HGET', P .. 'costs:' .. q, tenant)) / count)
  local steps = (time - turn) / each
  local ahead = math.ceil(steps)
  if ahead == steps and before_tie then ahead = ahead + 1 end
  return math.min(count, ahead)
end

-- How many jobs are claimed before this one, if no other comes: exact where a tenant's jobs cost alike. Looks at no
-- more than a thousand other tenants. For a job that waits, or that would take its place.
local function num_ahead(job)
  local q, class = queue_of(job), class_of(job)
  local ahead = 0
  for _, other in ipairs(redis.call('ZRANGE', P .. 'classes:' .. job.model, 0, -1)) do
    if other < class then ahead = ahead + tonumber(redis.call('HGET', P .. 'order:' .. job.model, 'n:' .. other)) end
  end
  local mine = P .. 'waiting:' .. q .. '\n' .. job.tenant
  local count = redis.call('ZCARD', mine)
  local rank = redis.call('ZLEXCOUNT', mine, '-', '(' .. job.place)
  local each = count > 0 and tonumber(redis.call('HGET', P .. 'costs:' .. q, job.tenant)) / count or 0
  local time = turn_of(job) + rank * each
  local others = redis.call('ZRANGEBYSCORE', P .. 'turns:' .. q, '-inf', time, 'WITHSCORES', 'LIMIT', 0, 1000)
  ahead = ahead + rank
  for i = 1, #others, 2 do
    if others[i] ~= job.tenant then
      ahead = ahead + num_before(q, others[i], tonumber(others[i + 1]), time, others[i] < job.tenant)
    end
  end
  return ahead
end

-- How fast a model's jobs end. The time in which nothing ran is no part of it. What it does under load is measured only
-- while jobs wait: else it would be how fast they come.
local function note_pace(job)
  local key = P .. 'pace:' .. job.model
  local seen = redis.call('HMGET', key, 'last', 'gap', 'busy_ms', 'busy_ends')
  local latest = NOW - math.max(number(seen[1]) or 0, tonumber(job.claimed_ms))
  local before = number(seen[2])
  redis.call('HSET', key, 'last', whole(NOW), 'gap', whole(before and before * 0.8 + latest * 0.2 or latest))
  if num_waiting(job.model) > 0 and not is_paused(job.model) then
    redis.call('HSET', key, 'busy_ms', (number(seen[3]) or 0) * 0.97 + latest,
      'busy_ends', (number(seen[4]) or 0) * 0.97 + 1)
    redis.call('HINCRBY', key, 'busy_seen', 1)
  end
end

-- Milliseconds between two ends, or nil; and whether that was measured lately and under load, so that a promise can be
-- built on it.
local function gap_of(model)
  local seen = redis.call('HMGET', P .. 'pace:' .. model, 'last', 'gap', 'busy_ms', 'busy_ends', 'busy_seen')
  if (number(seen[5]) or 0) >= 16 then
    return tonumber(seen[3]) / tonumber(seen[4]), NOW - tonumber(seen[1]) < 600000
  end
  return number(seen[2]), false
end
