#include "tools/engramctl/topology_tree.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

namespace engram {

namespace {

// A line of the tree with what hangs below it.
struct Branch {
  std::string text;
  std::vector<Branch> below = {};
  std::vector<std::string> cells = {};  // instead of branches: side by side
};

size_t Characters(std::string_view text) {
  return static_cast<size_t>(std::ranges::count_if(
      text, [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; }));
}

void DrawCells(const std::vector<std::string>& cells, const std::string& indent,
               size_t line_columns, std::string* out) {
  constexpr size_t kGap = 3;
  size_t width = 0;
  for (const std::string& cell : cells) width = std::max(width, Characters(cell));
  const size_t room = line_columns > Characters(indent) ? line_columns - Characters(indent) : 0;
  const size_t fitting = std::max<size_t>(1, (room + kGap) / (width + kGap));
  // As many lines as it takes, evenly filled.
  const size_t lines = (cells.size() + fitting - 1) / fitting;
  const size_t columns = (cells.size() + lines - 1) / lines;
  for (size_t i = 0; i < cells.size(); ++i) {
    if (i % columns == 0) *out += indent;
    *out += cells[i];
    const bool ends = (i + 1) % columns == 0 || i + 1 == cells.size();
    *out += ends ? "\n" : std::string(width - Characters(cells[i]) + kGap, ' ');
  }
}

void DrawBelow(const Branch& branch, const std::string& indent, size_t line_columns,
               std::string* out) {
  if (!branch.cells.empty()) DrawCells(branch.cells, indent, line_columns, out);
  for (size_t i = 0; i < branch.below.size(); ++i) {
    const bool last = i + 1 == branch.below.size();
    *out += indent + (last ? "└─ " : "├─ ") + branch.below[i].text + "\n";
    DrawBelow(branch.below[i], indent + (last ? "   " : "│  "), line_columns, out);
  }
}

std::string Counted(size_t count, std::string_view one, std::string_view many) {
  return std::to_string(count) + " " + std::string(count == 1 ? one : many);
}

class Drawer {
 public:
  Drawer(const Topology& topology, const CorePlan* plan) : topology_(topology) {
    for (const Cpu& cpu : topology.cpus) cpus_.push_back(&cpu);
    for (const Cpu& cpu : topology.forbidden) {
      cpus_.push_back(&cpu);
      forbidden_.insert(cpu.os_index);
    }
    std::ranges::sort(cpus_, {}, &Cpu::os_index);
    if (plan == nullptr) return;
    for (const CoreRole role : kCoreRoles) {
      const std::vector<int>& list = plan->map.of(role);
      for (size_t i = 0; i < list.size(); ++i) {
        std::string& text = roles_[list[i]];
        text += (text.empty() ? "" : " + ") + std::string(CoreRoleName(role));
        if (list.size() > 1) text += " " + std::to_string(i);
      }
    }
  }

  Branch Machine() const {
    std::map<int, std::vector<const Cpu*>> sockets;
    for (const Cpu* cpu : cpus_) sockets[cpu->socket_index].push_back(cpu);
    uint64_t memory = 0;
    for (const NumaNode& node : topology_.nodes) memory += node.memory_bytes;
    Branch machine;
    machine.text = "machine: " + Counted(sockets.size(), "socket", "sockets") + ", " +
                   Counted(topology_.nodes.size(), "NUMA node", "NUMA nodes") + ", " +
                   Counted(CoresOf(cpus_).size(), "core", "cores") + ", " +
                   Counted(cpus_.size(), "processor", "processors") + MemoryText(memory);
    // A node above the sockets (a machine with one memory) is drawn once.
    const bool nodes_above = std::ranges::any_of(topology_.nodes, [&](const NumaNode& node) {
      std::set<int> in;
      for (const Cpu* cpu : cpus_) {
        if (cpu->numa_node == node.os_index) in.insert(cpu->socket_index);
      }
      return in.size() > 1;
    });
    if (nodes_above) {
      for (const NumaNode& node : topology_.nodes) {
        Branch branch = NodeLine(node);
        for (const auto& [socket, cpus] : sockets) {
          branch.below.push_back(Caches(OfNode(cpus, node.os_index), SocketText(socket)));
        }
        machine.below.push_back(std::move(branch));
      }
    } else {
      for (const auto& [socket, cpus] : sockets) machine.below.push_back(Socket(socket, cpus));
      // Memory without processors (CXL).
      for (const NumaNode& node : topology_.nodes) {
        if (OfNode(cpus_, node.os_index).empty()) machine.below.push_back(NodeLine(node));
      }
    }
    for (const Nic& nic : topology_.nics) {
      if (nic.numa_node < 0) machine.below.push_back({.text = NicText(nic) + ", node unknown"});
    }
    return machine;
  }

 private:
  // Machines that are not there may not say how much they have.
  static std::string MemoryText(uint64_t bytes) {
    return bytes > 0 ? ", " + BytesText(bytes) : std::string();
  }
  static std::string SocketText(int socket) { return "socket " + std::to_string(socket); }
  static std::string NicText(const Nic& nic) {
    return "NIC " + nic.name + (nic.bus_id.empty() ? "" : " at PCI " + nic.bus_id);
  }

  static std::vector<const Cpu*> OfNode(const std::vector<const Cpu*>& cpus, int node) {
    std::vector<const Cpu*> of_node;
    std::ranges::copy_if(cpus, std::back_inserter(of_node),
                         [&](const Cpu* cpu) { return cpu->numa_node == node; });
    return of_node;
  }

  static std::map<int, std::vector<const Cpu*>> CoresOf(const std::vector<const Cpu*>& cpus) {
    std::map<int, std::vector<const Cpu*>> cores;
    for (const Cpu* cpu : cpus) cores[cpu->core_index].push_back(cpu);
    return cores;
  }

  Branch NodeLine(const NumaNode& node) const {
    Branch branch;
    branch.text = "NUMA node " + std::to_string(node.os_index) + MemoryText(node.memory_bytes);
    for (const Nic& nic : topology_.nics) {
      if (nic.numa_node == node.os_index) branch.below.push_back({.text = NicText(nic)});
    }
    return branch;
  }

  Branch Socket(int socket, const std::vector<const Cpu*>& cpus) const {
    Branch branch{.text = SocketText(socket)};
    for (const NumaNode& node : topology_.nodes) {
      const auto near = OfNode(cpus, node.os_index);
      if (near.empty()) continue;
      Branch line = NodeLine(node);
      Branch caches = Caches(near, "cores");
      if (caches.below.empty()) {
        line.below.push_back(std::move(caches));
      } else {
        std::ranges::move(caches.below, std::back_inserter(line.below));
      }
      branch.below.push_back(std::move(line));
    }
    return branch;
  }

  // The cores below `text`, by level-3 cache where those are known.
  Branch Caches(const std::vector<const Cpu*>& cpus, std::string text) const {
    std::map<int, std::vector<const Cpu*>> caches;
    for (const Cpu* cpu : cpus) caches[cpu->l3_index].push_back(cpu);
    Branch branch{.text = std::move(text)};
    for (const auto& [cache, sharing] : caches) {
      if (cache < 0) {
        branch.cells = Cells(sharing);
        continue;
      }
      const auto index = static_cast<size_t>(cache);
      const uint64_t bytes = index < topology_.l3_bytes.size() ? topology_.l3_bytes[index] : 0;
      branch.below.push_back(
          {.text = "L3 cache" + (bytes > 0 ? ", " + BytesText(bytes) : std::string()),
           .cells = Cells(sharing)});
    }
    return branch;
  }

  // "core 3: cpu 3 ingress, 11".
  std::vector<std::string> Cells(const std::vector<const Cpu*>& cpus) const {
    std::vector<std::string> cells;
    for (const auto& [core, threads] : CoresOf(cpus)) {
      std::string cell = "core " + std::to_string(core) + ": cpu ";
      for (size_t i = 0; i < threads.size(); ++i) {
        const int cpu = threads[i]->os_index;
        cell += (i == 0 ? "" : ", ") + std::to_string(cpu);
        if (forbidden_.contains(cpu)) cell += " (not ours)";
        if (const auto role = roles_.find(cpu); role != roles_.end()) cell += " " + role->second;
      }
      cells.push_back(std::move(cell));
    }
    return cells;
  }

  const Topology& topology_;
  std::vector<const Cpu*> cpus_;
  std::set<int> forbidden_;
  std::map<int, std::string> roles_;
};

}  // namespace

std::string DrawTopology(const Topology& topology, const CorePlan* plan, size_t line_columns) {
  const Branch machine = Drawer(topology, plan).Machine();
  std::string text = machine.text + "\n";
  DrawBelow(machine, "", line_columns, &text);
  return text;
}

std::string BytesText(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  char text[32];
  const bool whole = value >= 100 || value == static_cast<double>(static_cast<uint64_t>(value));
  std::snprintf(text, sizeof(text), whole ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text;
}

}  // namespace engram
