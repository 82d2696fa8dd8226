config = dict(
    runs="out",  # folder under which checkpoints are looked for: each may be chosen, one is in memory
    host="127.0.0.1",  # address to listen on: this machine only; another, such as 0.0.0.0, needs api_key
    port=8000,  # 0: any that is free
    api_key=None,  # what clients must send as Authorization: Bearer ...; the page asks for it
    allowed_hosts=[],  # more names of this server, such as that of a proxy before it: others are refused
    temperature=0.8,  # the defaults of a request: at 0 always the likeliest token
    top_k=0,  # draw from the k likeliest tokens only; 0: from all
    top_p=0.9,  # draw from the likeliest tokens that together have this probability; 1: from all
    min_p=0.0,  # leave out tokens with less than this share of the likeliest one's probability; 0: none
    repetition_penalty=1.0,  # above 1: tokens already there become less likely
    max_new_tokens=256,  # longest reply; half of the context at most is kept free for it
    max_queue=256,  # requests that wait; one address may fill half of it, the next gets 429
    max_body=262144,  # bytes of a request, of which more gets 413
    max_messages=256,  # messages of a conversation
    max_characters=20000,  # of one message or prompt
    device="auto",  # auto: cuda, else mps, else cpu
)
