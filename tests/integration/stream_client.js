// Streams observations over a WebSocket and recalls some of them: in a browser's page and in Node
// alike. Resolves to what it saw.
//
// streamAndRecall(WebSocket, "ws://127.0.0.1:8080/v1/stream", "space", 1000)

function vectorOf(number, dimension) {
  // Each its own direction, the same wherever this runs.
  const vector = [];
  let state = (number + 1) * 2654435761 % 4294967296;
  for (let i = 0; i < dimension; i++) {
    state = (state * 1664525 + 1013904223) % 4294967296;
    vector.push(state / 4294967296 - 0.5);
  }
  return vector;
}

function streamAndRecall(Socket, address, space, count) {
  const dimension = 32;
  const recalled = [0, Math.floor(count / 2), count - 1];
  return new Promise((resolve, reject) => {
    const socket = new Socket(address);
    const seen = {acked: 0, inOrder: true, found: [], final: null};
    const send = (message) => socket.send(JSON.stringify(message));
    const recall = () => send({
      type: "recall", request_id: recalled[seen.found.length], max_results: 1,
      vector: vectorOf(recalled[seen.found.length], dimension)});
    socket.onerror = (event) => reject(new Error("error: " + (event.message || "")));
    socket.onclose = (event) => seen.final === null ?
      reject(new Error("closed with " + event.code)) : resolve({...seen, code: event.code});
    socket.onopen = () => send({type: "init", memory_space_id: space});
    socket.onmessage = (event) => {
      const message = JSON.parse(event.data);
      if (message.type === "init_ack") {
        for (let i = 0; i < count; i++) {
          send({type: "observation", session_id: message.session_id, sequence_number: i + 1,
                episode: {id: "o" + i, what: "number " + i + " ☂", embedding: vectorOf(i, dimension)}});
        }
      } else if (message.type === "ack") {
        seen.inOrder = seen.inOrder && message.sequence_number === ++seen.acked &&
          message.status === "accepted";
        if (seen.acked === count) recall();
      } else if (message.type === "recall_result") {
        seen.found.push([message.request_id, message.results[0].id, message.results[0].content]);
        if (seen.found.length < recalled.length) recall();
        else send({type: "close"});
      } else if (message.type === "closed") {
        seen.final = message.final_sequence;
      } else if (message.type !== "heartbeat") {
        reject(new Error(event.data));
      }
    };
  });
}

if (typeof module !== "undefined" && require.main === module) {
  const [address, space, count] = process.argv.slice(2);
  streamAndRecall(require("ws"), address, space, Number(count)).then(
    (seen) => console.log(JSON.stringify(seen)),
    (error) => { console.error(error); process.exit(1); });
}
