-- Read the list of drops, as anybody.
dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "common.lua")

wrk.method = "GET"
wrk.path = "/api/drops"

function response(status, headers, body)
  count(status, body)
end
