-- A generated column of a stream: where it is not NULL, a message is answered with 200 and this text, in place of 201. For
-- Slack, Event Grid, Firehose and Mailgun: put it behind the columns of their stream, and keep the lines that you need.
answer TEXT AS (CASE
    WHEN body ->> 'type' = 'url_verification' THEN body ->> 'challenge'
    WHEN body ->> '$[0].data.validationCode' IS NOT NULL
        THEN json_object('validationResponse', body ->> '$[0].data.validationCode')
    WHEN body ->> 'requestId' IS NOT NULL
        THEN json_object('requestId', body ->> 'requestId', 'timestamp', body -> 'timestamp')
    WHEN body ->> '$."event-data"' IS NOT NULL THEN 'ok' END)
