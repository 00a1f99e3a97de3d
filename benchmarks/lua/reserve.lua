-- Reserve, each time as another user. Arguments: the first user's number, then drop ids;
-- the k-th of several drops is asked for with a probability in proportion to 1/k (zipf).
dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "common.lua")

local user, drops, chances, host = 0, {}, {}, ""

function init(args)
  user, host = tonumber(args[1]), wrk.headers["Host"]
  local sum = 0
  for index = 2, #args do
    table.insert(drops, args[index])
    sum = sum + 1 / #drops
    chances[#drops] = sum
  end
  for index = 1, #drops do
    chances[index] = chances[index] / sum
  end
  math.randomseed(1)
end

local function choose_drop()
  if #drops == 1 then
    return drops[1]
  end
  local dice = math.random()
  for index = 1, #drops do
    if dice <= chances[index] then
      return drops[index]
    end
  end
  return drops[#drops]
end

function request()
  local id = user_id(user)
  user = user + 1
  return string.format(
    "POST /api/drops/%s/reserve HTTP/1.1\r\nHost: %s\r\nX-User-Id: %s\r\n" ..
    "Content-Length: 0\r\n\r\n", choose_drop(), host, id)
end

function response(status, headers, body)
  count(status, body)
end
