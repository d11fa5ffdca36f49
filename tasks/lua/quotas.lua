-- What a tenant may ask for; limits are set by the settings [tenants.NAME].
--
--   tenants           hash  tenant ('*' = whoever is not named) -> JSON: weight and limits, absent = none
--   quota:<tenant>    hash  of each rate <name>, how much of it is used (leaks away evenly, all of the limit in its
--                           period) and <name>_ms, as of when; dies by itself after a day
-- Lines of batches leave half of every quota to other work: they wait, and nobody's chat is refused for them. What has
-- nothing before it always passes, if it is not larger than the quota itself. Tokens are charged by estimate when a job
-- comes, and settled when it ends with what it took.

local RATES = {
  {name = 'requests_per_minute', period_ms = 60000},
  {name = 'tokens_per_minute', period_ms = 60000, of_tokens = true},
  {name = 'tokens_per_day', period_ms = 86400000, of_tokens = true},
}

local function limits_of(tenant)
  local json = redis.call('HGET', P .. 'tenants', tenant) or redis.call('HGET', P .. 'tenants', '*')
  return json and cjson.decode(json) or {}
end

local function room_for(job, limit)
  return job.batch ~= '' and limit / 2 or limit
end

local function fits(job, used, amount, limit)
  return used + amount <= room_for(job, limit) or (used == 0 and amount <= limit)
end

local function used_now(tenant, rate, limit)
  local seen = redis.call('HMGET', P .. 'quota:' .. tenant, rate.name, rate.name .. '_ms')
  return math.max(0, (number(seen[1]) or 0) - limit * (NOW - (number(seen[2]) or 0)) / rate.period_ms)
end

local function count_in(tenant, states)
  local count = 0
  for _, state in ipairs(states) do count = count + redis.call('ZCARD', P .. 'in:' .. state .. ':' .. tenant) end
  return count
end

local function refusal(job, name, used, amount, limit, wait_ms)
  if amount > limit then return {'beyond', name, limit, amount} end
  if not fits(job, used, amount, limit) then return {'quota', name, limit, whole(math.ceil(used)), wait_ms} end
end

-- Whether a job may come: nil, or the answer {'quota', name, limit, used, ms to wait or ''} | {'beyond', name, limit,
-- amount}. amounts: of the job, by what they are counted in.
local function refused_by_quota(job, limits, amounts)
  local counted = {
    {'queued_jobs', {'queued'}},
    {'concurrent_jobs', {'queued', 'in_progress', 'cancelling'}},
  }
  for _, quota in ipairs(counted) do
    local limit = limits[quota[1]]
    local answer = limit and refusal(job, quota[1], count_in(job.tenant, quota[2]), 1, limit, '')
    if answer then return answer end
  end
  if limits.queued_bytes then
    local used = number(redis.call('HGET', P .. 'bytes', job.tenant)) or 0
    local answer = refusal(job, 'queued_bytes', used, amounts.bytes, limits.queued_bytes, '')
    if answer then return answer end
  end
  for _, rate in ipairs(RATES) do
    local limit, amount = limits[rate.name], amounts[rate.name]
    if limit then
      local used = used_now(job.tenant, rate, limit)
      local wait_ms = math.min(used, used + amount - room_for(job, limit)) * rate.period_ms / limit
      local answer = refusal(job, rate.name, used, amount, limit, whole(math.ceil(wait_ms)))
      if answer then return answer end
    end
  end
end

local function charge_rate(tenant, rate, limit, amount)
  local key = P .. 'quota:' .. tenant
  local used = math.max(0, used_now(tenant, rate, limit) + amount)
  redis.call('HSET', key, rate.name, used, rate.name .. '_ms', whole(NOW))
  redis.call('PEXPIRE', key, 86400000)
end

local function use_quotas(job, limits, amounts)
  for _, rate in ipairs(RATES) do
    if limits[rate.name] then charge_rate(job.tenant, rate, limits[rate.name], amounts[rate.name]) end
  end
end

-- Declared in records.lua. A job ends: its tenant gets back what it was charged too much, or pays the rest. What a job
-- took that ran and says no usage is not known; one that never ran took nothing. A job that runs again after its end
-- has paid for what it took before, so that in all its last run counts.
settle = function(job, usage)
  local charged = number(job.tokens)
  if not charged then return end
  local took = tonumber(string.match(usage, '"total_tokens":(%d+)'))
  if not took and job.started_ms ~= '' then return end
  took = took or 0
  redis.call('HSET', job.key, 'tokens', whole(took))
  local limits = limits_of(job.tenant)
  for _, rate in ipairs(RATES) do
    local limit = rate.of_tokens and limits[rate.name]
    if limit then charge_rate(job.tenant, rate, limit, took - charged) end
  end
end
