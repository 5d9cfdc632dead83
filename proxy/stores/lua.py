"""What Redis does for us in one step each. KEYS[1] is always the record of the epoch; every other key begins as it does, so that
one call touches one slot.

    epoch                      hash: id, run (of the server), round, state (open, closed), opened, fresh, budgets, loader
    workers                    sorted set: lease -> when it ends (seconds)
    rate:SCOPE:METRIC          theoretical arrival time and the time of writing, in microseconds
    EPOCH:holds:WORKER         hash: request -> what it took
    EPOCH:open:SCOPE           hash: lease -> open requests
    EPOCH:money:BUDGET         hash: t = loaded; s and h + START = spent and held in the window that began then
    EPOCH:done:REQUEST         settled without a hold, or with one that was taken back: neither is to be done again
    EPOCH:joined               set: workers
    EPOCH:acks:ROUND           set: leases

Money is whole micro-dollars below 2^53, where a double is exact. Counters, holds and open requests belong to an epoch: after a flush
or a fail-over a new one begins, and nothing of the old is believed. Rates may stay: an older one is only more generous.
"""

from __future__ import annotations

import hashlib

_BEGIN = """
local call = redis.call
local base = string.sub(KEYS[1], 1, -6)
local function clock()
  local t = call('TIME')
  return t[1] * 1000000 + t[2]
end
local function arrival(key, now)
  local written = call('GET', key)
  if not written then return now end
  local at, last = string.match(written, '(%d+) (%d+)')
  at, last = tonumber(at), tonumber(last)
  -- The server's clock was set back: what was to wait so long then has to wait so long now.
  if last > now + 1000000 then at = at - (last - now) end
  return at > now and at or now
end
local function arrive(key, at, now)
  call('SET', key, string.format('%.0f %.0f', at, now), 'PX', math.ceil((at - now) / 1000) + 60000)
end
"""

# ARGV: epoch, lease, worker, request, tokens, money, most, mode; then of each gate: kind, key, amount, enforce, start.
# Mode 1 asks; mode 2 takes back what a worker holds already, whatever the limits say. `most` (or -) is held in place of `money`
# where anything is held under a hard budget: see Hold.
# Gives {1, shadowed gates, then of requests and of tokens: limit, remaining, microseconds until all is free (or -1)},
# {0, gate, microseconds to wait}, {2} another epoch, {3, gate} a budget that is not loaded.
RESERVE = (
    _BEGIN
    + """
local epoch = call('HGET', KEYS[1], 'id')
if epoch ~= ARGV[1] then return {2} end
local mine = base .. epoch .. ':'
local holds = mine .. 'holds:' .. ARGV[3]
local asks = ARGV[8] == '1'
if call('HEXISTS', holds, ARGV[4]) == 1 or not asks and call('EXISTS', mine .. 'done:' .. ARGV[4]) == 1 then
  return {1, '', -1, -1, -1, -1, -1, -1}
end
local now, tokens, money, most = clock(), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local seconds, beside = now / 1000000, false
if asks and most then
  for i = 9, #ARGV, 5 do
    local held = ARGV[i] == 'm' and ARGV[i + 3] == '1' and call('HGET', mine .. 'money:' .. ARGV[i + 1], 'h' .. ARGV[i + 4])
    beside = beside or held and tonumber(held) > 0
  end
  if beside then money = most end
end
local holding = money and string.format('%.0f', money) or ARGV[6]
local taken, shadowed, room, ats = {}, '', {r = {-1, -1, -1}, t = {-1, -1, -1}}, {}
for i = 9, #ARGV, 5 do
  local kind, key, amount, enforce, start = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3] == '1', ARGV[i + 4]
  local gate, wait = (i - 9) / 5, nil
  if kind == 'r' or kind == 't' then
    local cost = kind == 'r' and 1 or math.min(tokens, amount)
    if amount == 0 then
      wait = 60000000
    else
      local at = arrival(base .. 'rate:' .. key, now) + cost * 60000000 / amount
      ats[gate] = at
      if at - now - 60000000 > 1 then wait = at - now - 60000000 end
    end
    taken[#taken + 1] = {kind, key, cost, amount}
  elseif kind == 'c' then
    if asks then
      local open, counts = 0, call('HGETALL', mine .. 'open:' .. key)
      for c = 1, #counts, 2 do
        local alive = counts[c] == ARGV[2]
        if not alive then
          local ends = call('ZSCORE', base .. 'workers', counts[c])
          alive = ends and tonumber(ends) > seconds
        end
        if alive then open = open + tonumber(counts[c + 1]) else call('HDEL', mine .. 'open:' .. key, counts[c]) end
      end
      if open >= amount then wait = 1000000 end
    end
    taken[#taken + 1] = {kind, key}
  else
    local known = call('HMGET', mine .. 'money:' .. key, 't', 's' .. start, 'h' .. start)
    if not known[1] then
      if asks and enforce then return {3, gate} end
    end
    if known[1] and not known[2] then
      -- The first request of a window: those before the last two days are over for good.
      for _, field in ipairs(call('HKEYS', mine .. 'money:' .. key)) do
        local began = tonumber(string.sub(field, 2))
        if began and began < tonumber(start) - 172800 then call('HDEL', mine .. 'money:' .. key, field) end
      end
      call('HSET', mine .. 'money:' .. key, 's' .. start, '0')
    end
    if known[1] and money and (tonumber(known[2]) or 0) + (tonumber(known[3]) or 0) + money > amount then
      wait = beside and 1000000 or 0
    end
    taken[#taken + 1] = {kind, key, start}
  end
  if wait and asks then
    if enforce then return {0, gate, string.format('%.0f', wait)} end
    shadowed = shadowed .. gate .. ' '
    -- What is refused takes nothing, or the next would seem to be refused for it. But money is spent all the same.
    if kind ~= 'm' then taken[#taken][1], ats[gate] = '-', nil end
  end
end
for g = 1, #taken do
  local gate, at = taken[g], ats[g - 1]
  local kind, key = gate[1], gate[2]
  if kind == 'c' then
    call('HINCRBY', mine .. 'open:' .. key, ARGV[2], 1)
    call('EXPIRE', mine .. 'open:' .. key, 86400)
  elseif kind == 'm' then
    if money and money > 0 then call('HINCRBY', mine .. 'money:' .. key, 'h' .. gate[3], holding) end
    call('EXPIRE', mine .. 'money:' .. key, 3456000)
  elseif at and asks then
    arrive(base .. 'rate:' .. key, at, now)
    local left = math.max(0, math.floor((60000000 - (at - now)) * gate[4] / 60000000 + 0.000001))
    if ARGV[9 + (g - 1) * 5 + 3] == '1' and (room[kind][1] < 0 or left < room[kind][2]) then
      room[kind] = {gate[4], left, string.format('%.0f', at - now)}
    end
  end
end
call('HSET', holds, ARGV[4], cmsgpack.pack({ARGV[2], holding, taken, not asks}))
call('EXPIRE', holds, 172800)
local r, t = room.r, room.t
return {1, shadowed, r[1], r[2], r[3], t[1], t[2], t[3]}
"""
)

# ARGV: epoch, worker, request, tokens and money (- = what was held), without a hold (0 nothing, 1 count it once, 2 count it once
# unless the worker belongs to this epoch); then of each counter: budget, start.
SETTLE = (
    _BEGIN
    + """
local epoch = call('HGET', KEYS[1], 'id')
if epoch ~= ARGV[1] then return 2 end
local mine = base .. epoch .. ':'
local holds = mine .. 'holds:' .. ARGV[2]
local packed = call('HGET', holds, ARGV[3])
local money, counters = ARGV[5], {}
for i = 7, #ARGV, 2 do counters[ARGV[i]] = ARGV[i + 1] end
if packed then
  call('HDEL', holds, ARGV[3])
  local hold = cmsgpack.unpack(packed)
  -- After a lost connection both are said again, and the taking back would make the settlement count twice.
  if hold[4] and ARGV[4] ~= '-' then call('SET', mine .. 'done:' .. ARGV[3], '1', 'EX', 86400) end
  local held, now = hold[2], nil
  if money == '-' then money = held end
  for _, gate in ipairs(hold[3]) do
    local kind, key = gate[1], gate[2]
    if kind == 't' and gate[4] > 0 and ARGV[4] ~= '-' then
      now = now or clock()
      local rate, more = base .. 'rate:' .. key, (tonumber(ARGV[4]) - gate[3]) * 60000000 / gate[4]
      arrive(rate, math.max(now, arrival(rate, now) + more), now)
    elseif kind == 'c' then
      local open = call('HGET', mine .. 'open:' .. key, hold[1])
      if open then
        if tonumber(open) > 1 then call('HINCRBY', mine .. 'open:' .. key, hold[1], -1)
        else call('HDEL', mine .. 'open:' .. key, hold[1]) end
      end
    elseif kind == 'm' then
      if tonumber(held) and tonumber(held) > 0 then
        local left = call('HINCRBY', mine .. 'money:' .. key, 'h' .. gate[3], '-' .. held)
        if left <= 0 then call('HDEL', mine .. 'money:' .. key, 'h' .. gate[3]) end
      end
      -- Of a budget that is only being loaded, whoever does not count it yet has this before the position up to which it ships.
      if not counters[key] and call('HEXISTS', mine .. 'money:' .. key, 't') == 1 then counters[key] = gate[3] end
    end
  end
else
  if ARGV[6] == '0' then return 0 end
  if ARGV[6] == '2' and call('SISMEMBER', mine .. 'joined', ARGV[2]) == 1 then return 0 end
  if not call('SET', mine .. 'done:' .. ARGV[3], '1', 'NX', 'EX', 86400) then return 0 end
end
if tonumber(money) and tonumber(money) ~= 0 then
  for budget, start in pairs(counters) do
    local key = mine .. 'money:' .. budget
    -- One that is neither loaded nor being loaded will be loaded from the database, where this stands, too.
    if call('EXISTS', key) == 1 then
      call('HINCRBY', key, 's' .. start, money)
      call('EXPIRE', key, 3456000)
    end
  end
end
return 1
"""
)

# ARGV: lease, lease seconds, the lease whose place it takes (or empty). Gives {had lapsed, workers alive, id, run, round, state}.
BEAT = (
    _BEGIN
    + """
local seconds = clock() / 1000000
local ends = call('ZSCORE', base .. 'workers', ARGV[1])
call('ZADD', base .. 'workers', string.format('%.3f', seconds + tonumber(ARGV[2])), ARGV[1])
if ARGV[3] ~= '' then call('ZREM', base .. 'workers', ARGV[3]) end
call('ZREMRANGEBYSCORE', base .. 'workers', '-inf', string.format('%.3f', seconds - 3600))
local s = call('HMGET', KEYS[1], 'id', 'run', 'round', 'state')
local alive = call('ZCOUNT', base .. 'workers', string.format('%.3f', seconds), '+inf')
return {(ends and tonumber(ends) > seconds) and 0 or 1, alive, s[1] or '', s[2] or '', tonumber(s[3] or '0'), s[4] or ''}
"""
)

# Begins a round. ARGV: a new epoch's id (or empty: in the one that is), the epoch that the caller knows, the server's run, budgets ...
OPEN = (
    _BEGIN
    + """
local id = call('HGET', KEYS[1], 'id') or ''
if id ~= ARGV[2] then return 0 end
if ARGV[1] == '' and (id == '' or call('HGET', KEYS[1], 'state') ~= 'closed') then return 0 end
local budgets, fresh = {}, ARGV[1] ~= '' and '1' or '0'
if fresh == '1' then id = ARGV[1] end
for i = 4, #ARGV do
  local key = base .. id .. ':money:' .. ARGV[i]
  if not call('HGET', key, 't') then
    call('DEL', key)
    call('HSET', key, 'o', '1')
    call('EXPIRE', key, 3456000)
  end
  budgets[#budgets + 1] = ARGV[i]
end
call('HSET', KEYS[1], 'id', id, 'run', ARGV[3], 'state', 'open', 'fresh', fresh, 'opened', string.format('%.0f', clock()),
  'budgets', table.concat(budgets, '\\n'))
call('HINCRBY', KEYS[1], 'round', 1)
call('HDEL', KEYS[1], 'loader', 'loads')
call('PUBLISH', base .. 'news', 'round')
return 1
"""
)

# ARGV: epoch, round, worker, budgets ... Gives false when the round is another one; else those of these budgets that are loaded,
# and those of the round while it is open.
JOIN = (
    _BEGIN
    + """
local s = call('HMGET', KEYS[1], 'id', 'round', 'state', 'budgets')
if s[1] ~= ARGV[1] or s[2] ~= ARGV[2] then return false end
call('SADD', base .. s[1] .. ':joined', ARGV[3])
call('EXPIRE', base .. s[1] .. ':joined', 3456000)
local loaded = {}
for i = 4, #ARGV do
  if call('HEXISTS', base .. s[1] .. ':money:' .. ARGV[i], 't') == 1 then loaded[#loaded + 1] = ARGV[i] end
end
return {loaded, s[3] == 'open' and s[4] or ''}
"""
)

# ARGV: epoch, round, lease, has shipped (1 or 0), seconds to gather, seconds to wait; of a lease, of silence after which another
# loads, and at most to load. Gives {open, you load}.
ACK = (
    _BEGIN
    + """
local s = call('HMGET', KEYS[1], 'id', 'round', 'state', 'opened', 'fresh', 'loader', 'loads')
if s[1] ~= ARGV[1] or s[2] ~= ARGV[2] or s[3] ~= 'open' then return {0, 0} end
local acks, now = base .. s[1] .. ':acks:' .. s[2], clock()
if ARGV[4] == '1' then
  call('SADD', acks, ARGV[3])
  call('EXPIRE', acks, 3600)
end
local age = (now - tonumber(s[4])) / 1000000
local ready = age >= tonumber(ARGV[6])
if not ready and (s[5] == '0' or age >= tonumber(ARGV[5])) then
  ready = true
  for _, lease in ipairs(call('ZRANGEBYSCORE', base .. 'workers', string.format('%.3f', now / 1000000), '+inf')) do
    if call('SISMEMBER', acks, lease) == 0 then ready = false end
  end
end
if not ready then return {1, 0} end
-- One of them loads. When it is not heard of any more, or does not come to an end, another does; but who reads for long is let read.
if s[6] and s[6] ~= ARGV[3] then
  local since, ends = (now - tonumber(s[7])) / 1000000, call('ZSCORE', base .. 'workers', s[6])
  local silent = not ends or tonumber(ends) < now / 1000000 + tonumber(ARGV[7]) - tonumber(ARGV[8])
  if since < tonumber(silent and ARGV[8] or ARGV[9]) then return {1, 0} end
end
call('HSET', KEYS[1], 'loader', ARGV[3], 'loads', string.format('%.0f', now))
return {1, 1}
"""
)

# ARGV: epoch, round, lease; then of each budget: budget, start, micro-dollars spent.
LOAD = (
    _BEGIN
    + """
local s = call('HMGET', KEYS[1], 'id', 'round', 'state', 'loader')
if s[1] ~= ARGV[1] or s[2] ~= ARGV[2] or s[3] ~= 'open' or s[4] ~= ARGV[3] then return 0 end
for i = 4, #ARGV, 3 do
  local key = base .. s[1] .. ':money:' .. ARGV[i]
  if not call('HGET', key, 't') then
    call('HINCRBY', key, 's' .. ARGV[i + 1], ARGV[i + 2])
    call('HSET', key, 't', '1')
    call('EXPIRE', key, 3456000)
  end
end
call('HSET', KEYS[1], 'state', 'closed')
call('PUBLISH', base .. 'news', 'round')
return 1
"""
)

# A dead worker goes. ARGV: epoch, worker. Gives the requests that it still holds.
BURY = (
    _BEGIN
    + """
for _, lease in ipairs(call('ZRANGE', base .. 'workers', 0, -1)) do
  if string.sub(lease, 1, #ARGV[2] + 1) == ARGV[2] .. '.' then call('ZREM', base .. 'workers', lease) end
end
return call('HKEYS', base .. ARGV[1] .. ':holds:' .. ARGV[2])
"""
)

ALL = tuple(script.encode() for script in (RESERVE, SETTLE, BEAT, OPEN, JOIN, ACK, LOAD, BURY))


def sha(script: str) -> bytes:
    """What Redis calls it."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()
