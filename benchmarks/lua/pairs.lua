-- Reserve and then purchase, each pair as another user. Arguments: the first user's number
-- and a drop's id. The purchase goes out as soon as any connection is free.
dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "common.lua")

local user, drop, host = 0, "", ""
local holders, first, last = {}, 1, 0

function init(args)
  user, drop, host = tonumber(args[1]), args[2], wrk.headers["Host"]
end

function request()
  local call, id = "reserve", nil
  if first <= last then
    call, id = "purchase", holders[first]
    holders[first] = nil
    first = first + 1
  else
    id = user_id(user)
    user = user + 1
  end
  return string.format(
    "POST /api/drops/%s/%s HTTP/1.1\r\nHost: %s\r\nX-User-Id: %s\r\n" ..
    "Content-Length: 0\r\n\r\n", drop, call, host, id)
end

function response(status, headers, body)
  if status == 201 and body:find('"expires_in"', 1, true) then
    last = last + 1
    holders[last] = body:match('"user_id":"([^"]+)"')
    count("reserved", body)
  else
    count(status, body)
  end
end
