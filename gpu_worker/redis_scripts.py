"""The Lua scripts of the transport: take messages in hand, and put them back. Redis runs each in one step."""

# KEYS: unacked, unacked_index, the bell of each queue, the hungry key of each, all lists in the order of service.
# ARGV: limit, now, idle slots, name of the worker, number of queues, the queue of each list, milliseconds of "hungry".
# Returns queue, message, queue, message, ... A message without a delivery tag is returned too, and kept nowhere.
CLAIM = """
local limit, num_queues = tonumber(ARGV[1]), tonumber(ARGV[5])
local first_list, claimed = 3 + 2 * num_queues, {}
for i = first_list, #KEYS do
  local queue = ARGV[6 + i - first_list]
  while #claimed < 2 * limit do
    local message = redis.call('RPOP', KEYS[i])
    if not message then break end
    local ok, tag = pcall(function() return cjson.decode(message).properties.delivery_tag end)
    if ok and type(tag) == 'string' then
      redis.call('ZADD', KEYS[2], ARGV[2], tag)
      redis.call('HSET', KEYS[1], tag, '[' .. message .. ',"",' .. cjson.encode(queue) .. ']')
    end
    claimed[#claimed + 1] = queue
    claimed[#claimed + 1] = message
  end
end
if #claimed < 2 * limit then
  -- The lists are empty, so rings that are left would wake for nothing.
  redis.call('DEL', unpack(KEYS, 3, 2 + num_queues))
  if #claimed / 2 < tonumber(ARGV[3]) then
    for i = 3 + num_queues, 2 + 2 * num_queues do redis.call('SET', KEYS[i], ARGV[4], 'PX', ARGV[#ARGV]) end
  end
end
return claimed
"""

# KEYS: unacked, unacked_index, the bell, then the list of each message. ARGV: delivery tag and text of each message.
# Returns how many went back; the others are not listed as unacked any more, so they are somebody else's.
GIVE_BACK = """
local num_given = 0
for i = 4, #KEYS do
  local tag, message = ARGV[2 * (i - 4) + 1], ARGV[2 * (i - 4) + 2]
  redis.call('ZREM', KEYS[2], tag)
  if redis.call('HDEL', KEYS[1], tag) == 1 then
    redis.call('RPUSH', KEYS[i], message)
    redis.call('LPUSH', KEYS[3], 1)
    num_given = num_given + 1
  end
end
return num_given
"""
