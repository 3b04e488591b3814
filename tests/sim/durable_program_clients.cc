#include "tests/sim/durable_program.h"

#include <algorithm>

namespace engram {

// ---- Clients ----

Operation* DurableProgram::MakeOperation(size_t which) {
  Client& client = clients_[which];
  ModelSpace& space = spaces_[client.space];
  auto made = std::make_unique<Operation>();
  made->number = operations_.size() + 1;
  made->client = which;
  made->space = client.space;
  made->id = random_.Below(space.ids.size());
  if (client.in_session && OneIn(12)) {
    made->invalid = true;
    if (OneIn(2)) {
      made->op = ObservationOp::kSkip;
      made->skip_reason = RefusalReason::kBadId;
    } else {
      made->vector.assign(kDimension + 1, 1.0F);
    }
    operations_.push_back(std::move(made));
    return operations_.back().get();
  }
  IdState& id = space.ids[made->id];
  if (id.in_turn && std::ranges::any_of(id.operations, [](const Operation* operation) {
        return operation->status == Status::kOut || operation->status == Status::kPending;
      })) {
    return nullptr;
  }
  if (OneIn(3)) made->op = ObservationOp::kDelete;
  if (id.in_turn && !client.in_session && OneIn(2)) {
    made->op = OneIn(2) ? ObservationOp::kSuppress : ObservationOp::kRestore;
  }
  if (made->op == ObservationOp::kUpsert) {
    made->payload = std::to_string(made->number) + ":";
    size_t filler = random_.Below(60);
    if (OneIn(8)) filler = random_.Below(3'000);
    if (fills_segments_ && OneIn(3)) filler = random_.Below(16'000);
    if (big_payloads_ && OneIn(10)) filler = random_.Below(60'000);
    made->payload.append(filler, static_cast<char>('a' + made->number % 26));
    for (size_t i = 0; i < kDimension; ++i) {
      made->vector.push_back(static_cast<float>(random_.Below(1u << 20)) / 1024);
    }
    space.vectors[made->payload] = made->vector;
  }
  id.operations.push_back(made.get());
  operations_.push_back(std::move(made));
  return operations_.back().get();
}

void DurableProgram::Send(size_t which) {
  Client& client = clients_[which];
  if (!client.attached) {
    Attach(which);
    return;
  }
  if (client.wait_until > now_ ||
      rig_->shards->outstanding(client.session.producer) >= DurableRig::kMostOutstanding) {
    return;
  }
  if (client.in_session) {
    SendInSession(which);
  } else if (client.out.size() < 4) {
    if (Operation* operation = MakeOperation(which)) SendAlone(operation);
  }
}

void DurableProgram::SendInSession(size_t which) {
  Client& client = clients_[which];
  if (client.goes_back) {
    if (CountOut(client) > 0) return;
    client.goes_back = false;
    client.next = client.settled + 1;
  }
  if (client.next > client.settled + 8 || rig_->shards->LaneFull(client.session)) return;
  if (client.next > client.session.credit_sequence) return;
  if (client.next > client.operations.size()) {
    Operation* operation = finishing_ ? nullptr : MakeOperation(which);
    if (operation == nullptr) return;
    client.operations.push_back(operation);
    operation->sequence = client.operations.size();
  }
  Operation* operation = client.operations[client.next - 1];
  ++client.next;
  Push(operation, client.session, operation->sequence);
}

void DurableProgram::SendAlone(Operation* operation) {
  Client& client = clients_[operation->client];
  RigSession nobody = client.session;
  nobody.id = SessionId();
  nobody.origin = 1'000 + operation->client;
  // To the shard that owns the id.
  const SpaceEntry* entry = rig_->shards->entry(nobody.space);
  const uint64_t hash = SpaceCatalogue::HashOfId(IdText(operation->space, operation->id));
  nobody.shard = entry->ShardOf(PartitionOf(hash, entry->partitions())).value();
  if (rig_->shards->LaneFull(nobody)) {
    operation->status = Status::kDead;
    return;
  }
  client.out.push_back(operation);
  Push(operation, nobody, operation->number);
}

void DurableProgram::Push(Operation* operation, const RigSession& session, Sequence sequence) {
  Observation observation{.op = operation->op,
                          .id = IdText(operation->space, operation->id),
                          .vector = operation->vector,
                          .payload = operation->payload,
                          .skip_reason = operation->skip_reason};
  if (operation->status == Status::kPending) {
    operation->sent_at = now_;
    operation->status = Status::kOut;
  }
  ++operation->outstanding;
  rig_->shards->PushObserve(session, sequence, observation);
  Say("send " + Describe(*operation) + " to shard " + std::to_string(session.shard));
}

void DurableProgram::TakeCompletions() {
  auto& completions = rig_->shards->completions;
  for (const auto& [producer, completion] : completions) {
    if (!violation_.empty()) return;
    if (completion.kind == CompletionKind::kHello) {
      hello_ = completion;
      // What comes behind it for the connection before is not the client's
      // any more.
      if (completion.reason == RefusalReason::kNone)
        clients_[attaching_].session.origin = completion.origin;
    }
    if (completion.kind == CompletionKind::kCredit) TakeCredit(completion);
    if (completion.kind == CompletionKind::kObserve) TakeObserved(completion);
  }
  completions.clear();
}

void DurableProgram::TakeCredit(const Completion& completion) {
  for (Client& client : clients_) {
    if (client.session.origin != completion.origin) continue;
    client.session.credit_sequence =
        std::max(client.session.credit_sequence, completion.credit_sequence);
  }
}

void DurableProgram::TakeObserved(const Completion& completion) {
  const bool alone = completion.origin < 10'000;
  if (alone) {
    Operation* operation = operations_[completion.sequence - 1].get();
    Client& client = clients_[operation->client];
    std::erase(client.out, operation);
    --operation->outstanding;
    if (completion.reason == RefusalReason::kNone) {
      Acknowledge(operation, {0, rig_->shards->alone_stamps[completion.sequence]});
    } else {
      operation->status = Status::kDead;
      Refused(&client, *operation, completion.reason);
    }
    return;
  }
  // By the connection's number: the client's, then which of its connections.
  Client& client = clients_[completion.origin / 10'000 - 1];
  if (completion.sequence > client.operations.size()) {
    Violate("an answer to what was not sent");
    return;
  }
  Operation* operation = client.operations[completion.sequence - 1];
  --operation->outstanding;
  const bool current = completion.origin == client.session.origin;
  client.session.credit_sequence =
      std::max(client.session.credit_sequence, current ? completion.credit_sequence : 0);
  const bool consumed = HasEffect(completion.reason, RefusalEffect::kConsumes);
  if (completion.reason == RefusalReason::kNone || consumed) {
    if (completion.reason == RefusalReason::kNone && operation->invalid && !completion.repeated) {
      Violate("accepted though invalid: " + Describe(*operation));
    }
    if (consumed && !operation->invalid) Violate("refused for good: " + Describe(*operation));
    Acknowledge(operation, {client.session.id.value(), completion.sequence});
    if (!current) return;
    if (completion.sequence > client.settled + 1) {
      Violate("answered out of order, settled " + std::to_string(client.settled) + ": " +
              Describe(*operation));
    }
    client.settled = std::max(client.settled, completion.sequence);
    return;
  }
  if (operation->outstanding == 0 && operation->status == Status::kOut) {
    operation->status = Status::kPending;
  }
  if (!current) return;
  client.goes_back = true;
  Refused(&client, *operation, completion.reason);
}

void DurableProgram::Refused(Client* client, const Operation& operation, RefusalReason reason) {
  ++stats_.refusals;
  stats_.disk_full += reason == RefusalReason::kDiskFull ? 1 : 0;
  stats_.disk_failing += reason == RefusalReason::kDiskFailing ? 1 : 0;
  client->wait_until = now_ + 1 + random_.Below(20);
  Say("refused " + Describe(operation) + ": " + std::string(DescribeRefusal(reason).name));
  switch (reason) {
    case RefusalReason::kQueueFull:
    case RefusalReason::kBacklogFull:
    case RefusalReason::kMemoryFull:
    case RefusalReason::kDiskFull:
    case RefusalReason::kDiskFailing:
    case RefusalReason::kLogBusy:
      return;
    case RefusalReason::kFenced:
      if (attaching_ == operation.client) return;
      break;
    case RefusalReason::kSequenceGap:
      if (operation.sequence > client->settled + 1) return;
      break;
    default:
      break;
  }
  Violate("refused with " + std::string(DescribeRefusal(reason).name) + ": " + Describe(operation));
}

void DurableProgram::Acknowledge(Operation* operation, const FlushAudit::Key& key) {
  ++stats_.acks;
  Say("ack " + Describe(*operation));
  operation->status = Status::kCertain;
  if (!operation->acked) operation->acked_at = now_;
  operation->acked = true;
  const ModelSpace& space = spaces_[operation->space];
  if (options_.audits && space.settings.durability == Durability::kFsync &&
      !rig_->audit.IsDurable(key)) {
    Violate("acknowledged before it was flushed: " + Describe(*operation));
  }
  if (!operation->invalid) ExpectPossible(operation->space, operation->id, "after its ack");
}

// ---- Hellos ----

void DurableProgram::Attach(size_t which) {
  Client& client = clients_[which];
  if (!client.in_session) {
    client.attached = true;
    return;
  }
  HelloParams params{.metric = Metric::kL2,
                     .dimension = static_cast<uint16_t>(kDimension),
                     .session = client.session.id};
  if (client.session.id.value() != 0) {
    params.shard = HomeOfSession(client.session.id).value() % shards_;
  } else {
    params.shard = rig_->shards->entry(client.session.space)->NextHome().value();
  }
  hello_.reset();
  attaching_ = which;  // What it has under way may be fenced.
  const bool was_attached = client.attached;
  const Origin origin = (which + 1) * 10'000 + ++connections_ % 10'000;
  rig_->shards->PushHello(client.session.producer, origin, client.session.space, params);
  for (int i = 0; i < 20'000 && !hello_ && !rig_->disks.power_failed && violation_.empty(); ++i) {
    PollAll();
  }
  attaching_ = SIZE_MAX;
  if (!hello_) {
    if (!rig_->disks.power_failed) Violate("a hello was not answered");
    return;
  }
  const HelloRequest& answer = rig_->shards->last_hello();
  Say("hello of client " + std::to_string(which) + ": " +
      std::string(DescribeRefusal(hello_->reason).name) + ", last " +
      std::to_string(answer.last_sequence));
  if (hello_->reason == RefusalReason::kSessionExpired) {
    if (client.floor > 0) {
      Violate("the session of client " + std::to_string(which) + " is gone, with " +
              std::to_string(client.floor) + " settled");
    }
    ForgetSession(&client);
    Attach(which);
    return;
  }
  if (hello_->reason != RefusalReason::kNone) {
    Violate("hello refused: " + std::string(DescribeRefusal(hello_->reason).name));
    return;
  }
  client.attached = true;
  client.session.shard = params.shard;
  client.session.id = answer.session;
  client.session.slot = answer.session_slot;
  client.session.credit_sequence = answer.last_sequence + answer.credit;
  TakeResume(which, answer.last_sequence, was_attached);
}

void DurableProgram::ForgetSession(Client* client) {
  for (Operation* operation : client->operations) operation->status = Status::kDead;
  client->operations.clear();
  client->session.id = SessionId();
  client->settled = 0;
  client->next = 1;
  client->goes_back = false;
}

void DurableProgram::TakeResume(size_t which, Sequence last, bool reconnected) {
  Client& client = clients_[which];
  const std::string who = "client " + std::to_string(which);
  if (last < client.floor) {
    Violate(who + " resumes at " + std::to_string(last) + ", and had settled " +
            std::to_string(client.floor));
  }
  if (last > client.operations.size()) Violate(who + " resumes beyond what it has sent");
  if (!violation_.empty()) return;
  if (reconnected && last < client.settled) Violate(who + " was told more than its hello says");
  for (Sequence sequence = 1; sequence <= client.operations.size(); ++sequence) {
    Operation* operation = client.operations[sequence - 1];
    if (sequence <= last) {
      operation->status = Status::kCertain;
      operation->acked_at = std::min(operation->acked_at, now_);
      if (options_.audits && spaces_[client.space].settings.durability == Durability::kFsync &&
          !rig_->audit.IsDurable({client.session.id.value(), sequence})) {
        Violate(who + " resumes at what was not flushed: " + Describe(*operation));
      }
    } else if (!reconnected) {
      operation->status = Status::kPending;
      operation->acked = false;
      operation->acked_at = kNever;
    }
  }
  if (!reconnected && spaces_[client.space].settings.durability != Durability::kFsync) {
    // What is sent from here on is something else: so ids keep to their
    // turns.
    for (size_t i = last; i < client.operations.size(); ++i) {
      // A checkpoint may have what its session does not.
      client.operations[i]->status = options_.checkpoints ? Status::kMaybe : Status::kDead;
      client.operations[i]->sequence = 0;
    }
    client.operations.resize(last);
  }
  client.settled = last;
  client.next = last + 1;
  client.goes_back = false;
  // What was read from the log stays.
  if (!reconnected) client.floor = client.durable = last;
}

void DurableProgram::Reconnect(size_t which) {
  if (clients_[which].in_session && clients_[which].attached) Attach(which);
}

}  // namespace engram
